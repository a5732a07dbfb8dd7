"""A pointer's versions: what a promotion, a rollback and retention make of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vitray.dataset import (
    Pointer,
    Version,
    VersionState,
    change_pointer,
    promoted,
    read_pointer,
    rolled_back,
    versions_to_delete,
    with_state,
)
from vitray.dataset.layout import is_own_file
from vitray.dataset.pointer import parse, to_json
from vitray.errors import JobError, StorageError
from vitray.schema import SourceRules

URL = "s3://photos-vit/current"
DAY = "2026-12-01T02:00:00+00:00"


def history(names: str, current: int | None = None, **states: str) -> Pointer:
    """Versions 1, 2, … of these datasets. states: of versions, such as v1="deleting"."""
    pointer: Pointer | None = None
    for name in names:
        pointer = promoted(pointer, f"s3://b/{name}", f"job-{name}", DAY, "ann")
    assert pointer is not None
    for number, state in states.items():
        pointer = with_state(pointer, [int(number[1:])], VersionState(state))
    return pointer if current is None else replace(pointer, current=current)


@pytest.mark.parametrize(
    ("old", "dataset", "current", "previous", "versions"),
    [
        (None, "a", 1, None, "a"),
        (history("a"), "b", 2, 1, "ab"),
        (history("ab"), "a", 3, 2, "aba"),
        (history("ab"), "b", 2, 1, "ab"),  # it is current already
        (history("abc", current=2), "d", 4, 2, "abcd"),  # version 3 was rolled back
        (history("abc", current=2), "b", 2, 1, "abc"),
        (history("abc", v1="deleted"), "a", 4, 3, "abca"),  # made again
    ],
)
def test_a_promotion_adds_a_version(
    old: Pointer | None, dataset: str, current: int, previous: int | None, versions: str
) -> None:
    new = promoted(old, f"s3://b/{dataset}", f"job-{dataset}", DAY, "bob")
    assert (new.current, new.current_version.previous) == (current, previous)
    assert [version.dataset[-1] for version in new.versions] == list(versions)


def test_a_dataset_that_was_made_again_with_another_job_is_another_version() -> None:
    new = promoted(history("a"), "s3://b/a", "another job", DAY, "bob")
    assert (new.current, [version.dataset for version in new.versions]) == (2, ["s3://b/a"] * 2)


def test_a_dataset_that_is_being_deleted_is_not_promoted() -> None:
    with pytest.raises(JobError, match="s3://b/a is being deleted, as version 1"):
        promoted(history("ab", v1="deleting"), "s3://b/a", "job-a", DAY, "bob")


@pytest.mark.parametrize(
    ("old", "to", "current"),
    [
        (history("ab"), None, 1),
        (history("abc"), 1, 1),
        (history("abc", current=1), 3, 3),  # forward again
        (promoted(history("abc", current=2), "s3://b/d", "job-d", DAY, "ann"), None, 2),
        (history("ab"), 2, 2),
    ],
)
def test_a_rollback_goes_to_the_version_before_or_to_the_chosen_one(
    old: Pointer, to: int | None, current: int
) -> None:
    new = rolled_back(old, to, "later", "bob")
    assert (new.current, new.versions) == (current, old.versions)
    assert (new == old) == (old.current == current)


@pytest.mark.parametrize(
    ("old", "to", "message"),
    [
        (history("a"), None, "version 1 is the first one.*No other version is kept"),
        (history("abc"), 7, r"there is no version 7\. Choose another by --to: 1, 2\."),
        (history("abc", v2="deleted"), None, r"version 2 was deleted .*s3://b/b.*--to: 1\."),
        (history("abc", v1="deleting"), 1, r"version 1 was deleted .*--to: 2\."),
    ],
)
def test_a_rollback_is_refused(old: Pointer, to: int | None, message: str) -> None:
    with pytest.raises(JobError, match=message):
        rolled_back(old, to, DAY, "bob")


@pytest.mark.parametrize(
    ("pointer", "keep", "expected"),
    [
        (history("a"), 1, []),
        (history("abcd"), 3, [1]),
        (history("abcd"), 1, [1, 2, 3]),
        (history("abcd"), 4, []),
        (history("abcd"), 9, []),
        (history("abcd", current=2), 1, [1, 3, 4]),  # never the current one
        (history("abcd", current=1), 2, [2, 3]),
        (history("abcd", v1="deleted"), 2, [2]),
        (history("abcd", v1="deleting"), 9, [1]),  # it has begun
        (history("abca"), 1, [2, 3]),  # the current version names a, too
        (history("abac"), 2, [2]),  # version 3 names a, too
        (history("cabab"), 3, []),  # three datasets
        (history("cabab"), 2, [1]),
    ],
)
def test_old_versions_go_and_the_current_one_never(
    pointer: Pointer, keep: int, expected: list[int]
) -> None:
    assert [version.number for version in versions_to_delete(pointer, keep)] == expected


@pytest.mark.parametrize(("old", "new"), [("s3://b/a", "s3://b/a/x"), ("s3://b/a/x", "s3://b/a")])
def test_a_dataset_within_a_kept_one_stays(old: str, new: str) -> None:
    pointer = promoted(promoted(None, old, "1", DAY, "ann"), new, "2", DAY, "ann")
    assert versions_to_delete(pointer, 1) == ()


def test_a_pointer_is_json_that_other_tools_can_read() -> None:
    document = json.loads(to_json(history("ab")))
    assert (document["current"], document["dataset"], document["fingerprint"]) == (
        2,
        "s3://b/b",
        "job-b",
    )
    assert [version["number"] for version in document["versions"]] == [1, 2]
    assert parse(URL, to_json(history("ab", v1="deleted"))) == history("ab", v1="deleted")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"[]", b'{"a": 1}', b"[" * 100_000])
def test_another_file_is_no_pointer(data: bytes) -> None:
    assert parse(URL, data) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vitray_pointer": 2}, "in format 2, and this vitray reads 1"),
        ({"current": 9}, "damaged pointer .its numbers are wrong"),
        ({"versions": []}, "damaged pointer"),
        ({"versions": [{"number": 1}]}, "damaged pointer"),
        ({"current": "x"}, "damaged pointer"),
    ],
)
def test_a_damaged_pointer_is_an_error(change: dict[str, object], message: str) -> None:
    document = {**json.loads(to_json(history("ab"))), **change}
    with pytest.raises(StorageError, match=message):
        parse(URL, json.dumps(document).encode())


@pytest.mark.parametrize("dataset", ["/etc", "s3://b/a/", "out", "s3://b/\x1b[31m"])
def test_a_pointer_in_a_bucket_names_only_datasets_in_buckets(dataset: str) -> None:
    data = to_json(promoted(None, dataset, "1", DAY, "ann"))
    with pytest.raises(StorageError, match="damaged pointer"):
        parse(URL, data)


@pytest.mark.parametrize(
    ("name", "is_own"),
    [
        ("_SUCCESS.json", True),
        ("_vitray/dataset.json", True),
        ("_vitray/runs/1.json", True),
        ("_vitray/pointers/0123456789abcdef.json", True),
        ("data/s-1.parquet", True),
        ("_errors/s-1.parquet", True),
        ("data/s-1.csv", False),
        ("data/more/s-1.parquet", False),
        ("errors/s-1.parquet", False),
        ("s-1.parquet", False),
        ("_vitray.txt", False),
        ("notes.md", False),
    ],
)
def test_own_files_have_the_names_that_vitray_writes(name: str, is_own: bool) -> None:
    assert is_own_file("/data/out", SourceRules.V2, f"/data/out/{name}") == is_own


def test_a_change_begins_again_where_somebody_else_changed_the_pointer(tmp_path: Path) -> None:
    url = str(tmp_path / "current")
    change_pointer(url, lambda old: promoted(old, "/a", "1", DAY, "ann"))
    seen = list[int]()

    def slow(old: Pointer | None) -> Pointer:
        assert old is not None
        seen.append(old.current)
        if len(seen) == 1:
            change_pointer(url, lambda now: promoted(now, "/b", "2", DAY, "bob"))
        return promoted(old, "/c", "3", DAY, "ann")

    change_pointer(url, slow)
    stored = read_pointer(url)
    assert stored is not None and seen == [1, 2]
    assert [version.dataset for version in stored.pointer.versions] == ["/a", "/b", "/c"]


def test_a_version_shows_its_state() -> None:
    assert str(Version(3, "/a", "1", DAY, "ann")) == f"version 3: /a (promoted {DAY})"
