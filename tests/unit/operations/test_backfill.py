"""vitray backfill: the next model's dataset from the very shards of the old one, compared with
it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from vitray.dataset import (
    NO_GROUP,
    append_group_log,
    block_keys,
    copy_groups,
    load_group_log,
    removed_keys,
)
from vitray.errors import JobError
from vitray.job import make_job
from vitray.operations.backfilling import next_job


def test_groups_that_the_old_dataset_got_since_are_taken_over_as_they_are(tmp_path: Path) -> None:
    old, new = (str(tmp_path / name) for name in ("old", "new"))
    nights = [[(0, "a"), (0, "b")], [(1, "c")], [(NO_GROUP, "a"), (2, "a"), (2, "d")]]
    for n, night in enumerate(nights):
        assert append_group_log(old, night)
        if n != 1:
            copy_groups(old, new)
            assert load_group_log(new) == load_group_log(old)
    append_group_log(new, [(3, "e")])
    append_group_log(old, [(3, "f")])
    copy_groups(old, new)  # which has gone its own way
    assert load_group_log(new)[-1] == (3, "e")


def test_beside_a_bucket_is_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitray.operations.backfilling.open_dataset", lambda out: object())
    monkeypatch.setattr("vitray.operations.backfilling.copy_groups", lambda old, new: None)
    monkeypatch.setattr("vitray.operations.backfilling.copy_removed_keys", lambda old, new: None)
    monkeypatch.setattr("vitray.operations.backfilling.with_source_rules", lambda job: job)
    job = make_job({"source": "in", "model": "a/old", "out": "s3://photos-vit/"})
    with pytest.raises(
        JobError,
        match=r"s3://photos-vit/ is a whole bucket, and another bucket may not be yours: .* --out",
    ):
        next_job(job, "a/new")
    assert next_job(job, "a/new", "s3://mine/new").out == "s3://mine/new"
    assert (
        next_job(job.model_copy(update={"out": "s3://photos/vit"}), "a/new").out
        == "s3://photos/vit-new"
    )


def test_without_an_old_dataset_or_into_it_nothing_is_done(tmp_path: Path) -> None:
    from factories import hand_made

    dataset = hand_made.make_dataset(tmp_path)
    with pytest.raises(JobError, match="is the existing dataset"):
        next_job(dataset.job, "m", dataset.out + "/")
    with pytest.raises(JobError, match="holds no vitray dataset to continue from"):
        next_job(make_job({"source": "x", "model": "m", "out": str(tmp_path / "none")}), "n")
    assert next_job(dataset.job, "google/vit-base:../x", None).out == f"{dataset.out}-x"


def test_removed_keys_stay_removed_in_the_next_dataset(tmp_path: Path) -> None:
    from factories import hand_made

    dataset = hand_made.make_dataset(tmp_path)
    block_keys(dataset.out, ["0/00"], {})
    for _ in range(2):
        job = next_job(dataset.job, "m")
        assert removed_keys(job.out) == removed_keys(dataset.out)


def test_the_next_model_has_its_own_revision_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitray.operations.backfilling.open_dataset", lambda out: object())
    job = make_job(
        {"source": "in", "model": "a/old", "revision": "v1", "out": str(tmp_path / "out")}
    )
    assert next_job(job, "a/new").revision is None
    assert next_job(job, "a/new", revision="v2").revision == "v2"
