"""A store on a local disk: permissions, links, full disks and odd names."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stores import MIB, below, put, require_one_line_with_next_step
from vitray.errors import ObjectMissing, StorageError
from vitray.storage import exists, join, read, store_for


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mount is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    store = store_for(str(small_disk))
    put(str(small_disk / "old"), b"o" * 1000)
    for work in (
        lambda: store.create(str(small_disk / "new"), bytes(2 * MIB)),
        lambda: store.replace(str(small_disk / "old"), bytes(2 * MIB)),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, str(small_disk), "The disk is full", "run the same command again"
        )
    assert below(str(small_disk)) == ["old"] and read(str(small_disk / "old")) == b"o" * 1000
    assert store.create(str(small_disk / "new"), b"small enough") is True


def test_a_read_only_disk_is_one_error(small_disk: Path) -> None:
    put(str(small_disk / "old"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = store_for(str(small_disk))
    for work in (
        lambda: store.create(str(small_disk / "new"), b"x"),
        lambda: store.delete([str(small_disk / "old")]),
    ):
        with pytest.raises(StorageError, match=r"read-only: choose another `out`\.$"):
            work()
    assert read(str(small_disk / "old")) == b"x"


def test_a_folder_is_no_object(root: str) -> None:
    put(join(root, "folder", "x"))
    assert not exists(join(root, "folder"))
    with pytest.raises(ObjectMissing):
        store_for(root).open(join(root, "folder"))
