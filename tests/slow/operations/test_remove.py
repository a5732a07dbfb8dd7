"""Runs whose source holds removed keys, killed or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import vitray
from support.removed_rows import all_keys, argv_of, copy_of, first, removal_of, require_removed
from support.zygote import Zygote

__all__ = ["first"]


def test_a_run_killed_beside_a_removal_leaves_no_key_after_the_next_run(
    commands: Zygote, first: Path, shapes_model: str, tmp_path: Path
) -> None:
    folder, expected = copy_of(first, tmp_path)
    removed = first.joinpath("keys").read_text().split()
    shutil.rmtree(folder / "out")
    run = argv_of(folder, shapes_model)
    assert commands.run(run, VITRAY_CRASH_AT="commit-errors") == -9
    assert commands.run(removal_of(folder), VITRAY_CRASH_AT="removal-blocked") == -9
    assert commands.run(run) == 0
    assert not set(removed) & set(all_keys(str(folder / "out")))
    assert sorted(all_keys(str(folder / "out"))) == sorted(expected)
    require_removed(folder, all_keys(str(folder / "out")))


def test_a_new_version_of_a_shard_writes_no_row_for_a_removed_key(
    commands: Zygote, first: Path, shapes_model: str, tmp_path: Path
) -> None:
    folder, expected = copy_of(first, tmp_path)
    shutil.rmtree(folder / "out")
    run = argv_of(folder, shapes_model)
    assert commands.run(run) == 0
    assert commands.run(removal_of(folder)) == 0
    tars = sorted((folder / "in").glob("*.tar"))
    tars[0].write_bytes(tars[0].read_bytes() + bytes(10240))  # another version, the same images
    shutil.copy(tars[1], folder / "in" / "copy.tar")
    assert commands.run(run) == 0
    keys = all_keys(str(folder / "out"))
    assert set(keys) == set(expected)
    assert vitray.validate(str(folder / "out"), content=True).ok
