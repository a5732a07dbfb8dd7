"""vitray backfill: the next model's dataset from the very shards of the old one, compared with
it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shards import pictures, put_files
from small_models import make_checkpoint

import vitray
from vitray.dataset import NO_GROUP, append_group_log, committed, copy_groups, load_group_log
from vitray.errors import JobError
from vitray.job import make_job
from vitray.operations.backfilling import next_job


def cli(*argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitray", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_next_dataset_has_the_shards_of_the_old_one(shapes_model: str, tmp_path: Path) -> None:
    """Loose files that came in two deliveries: listed at once they would make other groups."""
    items = pictures(70)
    put_files(str(tmp_path / "in"), items[:10])
    fields = {
        "source": f"{tmp_path}/in",
        "model": shapes_model,
        "out": f"{tmp_path}/out",
        "group_size": 32,
        "engine": "torch",
    }
    (tmp_path / "job.yaml").write_text(json.dumps(fields))
    assert cli("run", tmp_path / "job.yaml").returncode == 0
    put_files(str(tmp_path / "in"), items[10:])
    assert cli("run", tmp_path / "job.yaml").returncode == 0
    make_checkpoint(tmp_path / "vit v2", "vit", headed=True)
    argv = ["backfill", tmp_path / "job.yaml", "--model", tmp_path / "vit v2"]
    done = cli(*argv)
    assert done.returncode == 0, done.stderr
    old, new = f"{tmp_path}/out", f"{tmp_path}/out-vit-v2"
    assert committed(new).keys() == committed(old).keys() and len(committed(new)) == 3
    assert load_group_log(new) == load_group_log(old)
    assert cli(*argv).stdout.startswith("0 shards committed now")
    told = json.loads(cli("compare", old, new, "--json").stdout)
    assert (told["rows"], told["only_old_shards"], told["only_new_shards"]) == (70, 0, 0)
    labels = [
        vitray.read(out, columns=["uri", "label"]).sort_by("uri")["label"].to_pylist()
        for out in (old, new)
    ]
    assert told["agreement"] == sum(a == b for a, b in zip(*labels)) / 70


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
    import hand_made

    dataset = hand_made.make_dataset(tmp_path)
    with pytest.raises(JobError, match="is the existing dataset"):
        next_job(dataset.job, "m", dataset.out + "/")
    with pytest.raises(JobError, match="holds no vitray dataset to continue from"):
        next_job(make_job({"source": "x", "model": "m", "out": str(tmp_path / "none")}), "n")
    assert next_job(dataset.job, "google/vit-base:../x", None).out == f"{dataset.out}-x"


def test_the_next_model_has_its_own_revision_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitray.operations.backfilling.open_dataset", lambda out: object())
    job = make_job(
        {"source": "in", "model": "a/old", "revision": "v1", "out": str(tmp_path / "out")}
    )
    assert next_job(job, "a/new").revision is None
    assert next_job(job, "a/new", revision="v2").revision == "v2"
