"""vitray compact: the same rows in few files, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray
from factories import hand_made
from factories.hand_made import finish_with
from support.compacting import EACH_ALONE, IN_ONE, rows_of
from vitray.dataset import Dataset, commit_shard
from vitray.errors import JobError
from vitray.operations import compacting
from vitray.operations.compacting import compact
from vitray.sources import list_shards


def test_another_datasets_parts_are_left_alone(tmp_path: Path) -> None:
    one, other = (
        hand_made.make_dataset(tmp_path, out=str(tmp_path / name)) for name in ("one", "other")
    )
    into = tmp_path / "into"
    compact(one.out, str(into))
    before = {path.name: path.read_bytes() for path in into.iterdir()}
    assert sorted(before)[0] == "_COMPACT.json" and "_COMPACTING.json" not in before
    with pytest.raises(JobError, match=f"holds the rows of {one.out}: choose an empty directory"):
        compact(other.out, str(into))
    (into / "_COMPACT.json").rename(into / "_COMPACTING.json")  # as after a kill
    with pytest.raises(JobError, match="holds the rows of"):
        compact(other.out, str(into))
    assert compact(one.out, str(into)).written == 0
    assert {path.name: path.read_bytes() for path in into.iterdir()} == before


def grow(dataset: Dataset, folder: Path) -> None:
    hand_made.write_tar(
        folder / "in" / "s-003.tar", {f"3/{i:02d}.jpg": f"new {i}".encode() for i in range(10)}
    )
    shards = list_shards(dataset.job, []).shards
    hand_made.stage(dataset, shards[3])
    assert commit_shard(dataset, shards[3])
    finish_with(dataset, [s.id for s in shards], [s.id for s in shards])


def test_a_dataset_that_grew_costs_its_new_parts_only(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    into = tmp_path / "into"
    compact(dataset.out, str(into), EACH_ALONE)
    before = {path: path.stat().st_mtime_ns for path in into.glob("part-*")}
    grow(dataset, tmp_path)
    found = compact(dataset.out, str(into), EACH_ALONE)
    assert (found.files, found.written, found.rows) == (4, 1, 36)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert rows_of(str(into)).equals(vitray.read(dataset.out))
    assert (
        compact(dataset.out, str(into), IN_ONE).parts == 1 and len(list(into.glob("part-*"))) == 1
    )
    assert rows_of(str(into)).equals(vitray.read(dataset.out))


def test_a_call_that_died_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, into, real = hand_made.make_dataset(tmp_path), tmp_path / "into", compacting.write_part
    left = iter([True, True])

    def dying(*args: object) -> None:
        if not next(left, False):
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(compacting, "write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        compact(dataset.out, str(into), EACH_ALONE)
    assert len(list(into.glob("part-*"))) == 2 and not (into / "_COMPACT.json").exists()
    monkeypatch.setattr(compacting, "write_part", real)
    assert compact(dataset.out, str(into), EACH_ALONE).written == 1
    assert rows_of(str(into)).equals(vitray.read(dataset.out))


def test_what_must_not_be_gathered_or_written_is_refused(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    with pytest.raises(JobError, match="is not complete"):
        compact(dataset.out, str(tmp_path / "into"))
    finish_with(dataset, [], [])
    for into in (dataset.out, f"{dataset.out}/data"):
        with pytest.raises(JobError, match="lies inside the dataset"):
            compact(dataset.out, into)
    whole = hand_made.make_dataset(tmp_path / "w", source=f"{tmp_path}/w/in")
    with pytest.raises(JobError, match=f"lies inside its source {tmp_path}/w/in: choose another "):
        compact(whole.out, str(tmp_path / "w" / "in" / "few"))
    with pytest.raises(JobError, match=r"holds s-000\.tar, which vitray compact did not write"):
        compact(dataset.out, str(tmp_path / "w" / "in"))
    assert len(list((tmp_path / "w" / "in").iterdir())) == 3
    for name in (
        "part-0.parquet",
        "part-00000-0123456789ab.parquet",
    ):  # other tools' names, and ours without a mark
        (tmp_path / name[:6]).mkdir(exist_ok=True)
        (tmp_path / name[:6] / name).write_bytes(b"somebody's")
        with pytest.raises(
            JobError,
            match=f"holds {name}, which vitray compact did not write: choose an empty directory",
        ):
            compact(dataset.out, str(tmp_path / name[:6]))
        assert (tmp_path / name[:6] / name).read_bytes() == b"somebody's"
        (tmp_path / name[:6] / name).unlink()
    hand_made.write_tars(tmp_path / "g" / "out2")
    few = tmp_path / "few"
    compact(dataset.out, str(few / "c"))
    with pytest.raises(
        JobError, match=r"holds c/_COMPACT\.json, which vitray compact did not write"
    ):  # readers would see its rows, too
        compact(dataset.out, str(few))
    assert [path.name for path in few.iterdir()] == ["c"]
    with pytest.raises(
        JobError,
        match=r"few/c holds the output of vitray compact \(_COMPACT\.json\): readers would see "
        r"rows "
        r"twice",
    ):
        hand_made.make_dataset(tmp_path / "again", out=str(few / "c"))
    globbed = hand_made.make_dataset(
        tmp_path / "g", source=f"{tmp_path}/g/{{in,out2}}/*.tar", out=f"{tmp_path}/o"
    )
    (tmp_path / "link").symlink_to(tmp_path / "g")
    for into in (f"{tmp_path}/g/out2", f"{tmp_path}/link/out2"):
        with pytest.raises(JobError, match="lies inside its source"):
            compact(globbed.out, into)
