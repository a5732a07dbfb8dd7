"""Pointers on every kind of store: two promotions at once, and deletions that are killed."""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import vitray as library
from factories import hand_made
from support.s3 import new_bucket
from support.zygote import Zygote
from vitray.crash import VERSION_POINTS
from vitray.dataset import Dataset, open_dataset, read_pointer
from vitray.errors import JobError, UnsafeStore
from vitray.operations.promoting import (
    delete_old_versions,
    preview_retention,
    promote,
    rollback,
)
from vitray.storage import absolute, exists, read, store_for

ROWS = 3 * (hand_made.IMAGES - 1)


def version(folder: Path, root: str, number: int) -> Dataset:
    spec = replace(hand_made.spec_of(str(folder / "model")), weights_sha256=str(number) * 64)
    return hand_made.make_dataset(folder, spec=spec, out=f"{root}/v{number}")


def names(root: str) -> set[str]:
    return {info.url.removeprefix(f"{root}/") for info in store_for(root).find(root)}


def test_two_promotions_at_once_both_become_versions(root: str, tmp_path: Path) -> None:
    datasets = [version(tmp_path, root, number) for number in (1, 2, 3)]
    pointer = f"{root}/current"
    barrier = threading.Barrier(len(datasets))

    def at_once(dataset: Dataset) -> int:
        barrier.wait()
        return promote(dataset.out, pointer, by="ann").version

    with ThreadPoolExecutor(len(datasets)) as pool:
        numbers = list(pool.map(at_once, datasets))
    stored = read_pointer(pointer)
    assert stored is not None
    versions = stored.pointer.versions
    assert sorted(numbers) == [one.number for one in versions] == [1, 2, 3]
    assert {one.dataset for one in versions} == {dataset.out for dataset in datasets}
    assert stored.pointer.current == 3


def test_versions_are_promoted_rolled_back_and_deleted(root: str, tmp_path: Path) -> None:
    first, second = (version(tmp_path, root, number) for number in (1, 2))
    pointer = f"{root}/current"
    for dataset in (first, second):
        promote(dataset.out, pointer)
        assert library.read(pointer).equals(library.read(dataset.out))
    assert json.loads(read(pointer))["dataset"] == second.out
    with pytest.raises(JobError, match=f"is a pointer to {second.out}"):
        open_dataset(pointer)
    assert rollback(pointer).previous_dataset == second.out
    assert library.read(pointer).equals(library.read(first.out))
    rollback(pointer, to=2)
    store_for(root).replace(f"{first.out}/notes.md", b"mine")
    assert preview_retention(pointer, 1).old[0].others == (f"{first.out}/notes.md",)
    retention = delete_old_versions(pointer, 1)
    assert ([old.version for old in retention.old], retention.kept) == ([1], (2,))
    assert {name for name in names(root) if name.startswith("v1")} == {"v1/notes.md"}
    assert library.read(pointer).num_rows == ROWS
    with pytest.raises(JobError, match="version 1 was deleted"):
        rollback(pointer)


def test_a_dataset_that_another_pointer_names_is_not_deleted(root: str, tmp_path: Path) -> None:
    first, second = (version(tmp_path, root, number) for number in (1, 2))
    promote(first.out, f"{root}/live")
    for dataset in (first, second):
        promote(dataset.out, f"{root}/current")
    before = names(root)
    with pytest.raises(JobError, match=f"{root}/live names it as version 1"):
        delete_old_versions(f"{root}/current", 1)
    assert names(root) == before
    promote(second.out, f"{root}/live")
    assert delete_old_versions(f"{root}/current", 1).deleted


def test_a_note_in_a_bucket_names_no_pointer_on_a_disk(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = new_bucket(mock_s3, monkeypatch)
    first, second = (version(tmp_path, s3, number) for number in (1, 2))
    local = str(tmp_path / "local")
    promote(first.out, local)
    assert not store_for(s3).find(f"{first.out}/_vitray/pointers")
    for dataset in (first, second):
        promote(dataset.out, f"{s3}/current")
    name = hashlib.sha256(local.encode()).hexdigest()[:16]
    forged = json.dumps({"pointer": local, "promoted": ""}).encode()
    store_for(s3).create(f"{first.out}/_vitray/pointers/{name}.json", forged)
    assert delete_old_versions(f"{s3}/current", 1).deleted


def test_a_new_place_without_a_pointer_is_a_new_dataset(root: str) -> None:
    assert open_dataset(f"{root}/none") is None
    assert read_pointer(root.rpartition("/")[0]) is None  # a bucket


def test_another_object_is_not_overwritten(root: str, tmp_path: Path) -> None:
    dataset = version(tmp_path, root, 1)
    store_for(root).create(f"{root}/notes", b"mine")
    with pytest.raises(JobError, match="no pointer of vitray"):
        promote(dataset.out, f"{root}/notes")
    assert read(f"{root}/notes") == b"mine"


def test_a_store_that_ignores_conditions_is_refused(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3 = new_bucket(mock_s3, monkeypatch)
    first, second = (version(tmp_path, s3, number) for number in (1, 2))
    promote(first.out, f"{s3}/current")
    store = store_for(s3)

    def replace_always(url: str, version: str, data: bytes, metadata: object = None) -> bool:
        store.replace(url, data)
        return True

    monkeypatch.setattr(store, "replace_version", replace_always)
    with pytest.raises(UnsafeStore, match="ignored the condition of a replace"):
        promote(second.out, f"{s3}/current")
    assert json.loads(read(f"{s3}/current"))["dataset"] == first.out


@pytest.mark.parametrize("point", VERSION_POINTS)
def test_a_killed_deletion_is_finished_by_the_same_command(
    commands: Zygote, tmp_path: Path, point: str
) -> None:
    first, second = (version(tmp_path, str(tmp_path), number) for number in (1, 2))
    pointer = str(tmp_path / "current")
    for dataset in (first, second):
        promote(dataset.out, pointer)
    clean = ["clean", pointer, "--keep-versions", "1", "--yes"]
    assert commands.run(clean, VITRAY_CRASH_AT=point) == -9
    assert exists(f"{absolute(first.out)}/_vitray/dataset.json")
    for refused in (lambda: rollback(pointer), lambda: promote(first.out, pointer, partial=True)):
        with pytest.raises(JobError, match="deleted"):
            refused()
    assert commands.run(clean) == 0
    assert not Path(first.out).exists()
    assert library.read(pointer).num_rows == ROWS
    assert [one["state"] for one in json.loads(read(pointer))["versions"]] == ["deleted", "kept"]
