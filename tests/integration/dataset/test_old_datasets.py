"""Datasets made before December 2026 open, validate and go on as they were begun: see
data/make_dataset_v1.py.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from support.old_datasets import FIRST, job_of, objects, rows
from vitray.dataset import open_dataset, read_footer
from vitray.operations.planning import plan, status
from vitray.operations.validation import validate
from vitray.storage import store_for


@pytest.mark.parametrize("name", FIRST)
def test_an_old_dataset_opens_and_is_valid(bucket: str, name: str) -> None:
    out = f"{bucket}/out/{name}"
    dataset = open_dataset(out)
    assert dataset is not None and (dataset.job.rules, dataset.errors_folder) == (1, "errors")
    report = status(out)
    assert (report.shards, report.rows, report.errors) == FIRST[name]
    checked = validate(out, content=True)
    assert checked.ok and checked.pending == 1, checked
    planned = plan(job_of(bucket, name))
    assert (planned.committed, planned.pending) == (FIRST[name][0], 1)


def test_tar_keys_of_an_old_dataset_end_at_the_first_dot(bucket: str) -> None:
    result = vitray.run(job_of(bucket, "tars"))
    by_shard = {row["shard"]: [] for row in rows(bucket, "tars")}
    for row in rows(bucket, "tars"):
        by_shard[row["shard"]].append(row["key"])
    assert sorted(by_shard.values()) == [["a", "b"], ["p", "Mr"], ["x", "y"]], (
        "as its first shards, and as what is staged"
    )
    assert result.left_out == {}, "what is staged was counted by nobody"


def test_suffixes_of_an_old_dataset_stay_those_that_it_knew(bucket: str) -> None:
    result = vitray.run(job_of(bucket, "files"))
    assert [row["key"].rpartition("/")[2] for row in rows(bucket, "files")] == [
        "a.jpg",
        "c.png",
        "d.jpg",
    ]
    assert result.left_out == {"other_suffix": 3}, "two .jfif and a .txt, which are told now"


def test_a_file_of_another_kind_does_not_stop_an_old_dataset(bucket: str) -> None:
    store_for(bucket).create(f"{bucket}/in/files/labels.csv", b"path\n")
    assert plan(job_of(bucket, "files")).left_out == {"other_suffix": 3, "other_kind": 1}


def test_types_and_keys_of_an_old_dataset_stay_those_that_it_had(bucket: str) -> None:
    vitray.run(job_of(bucket, "parquet"))
    table = rows(bucket, "parquet")
    assert [row["key"] for row in table] == [
        "p10.jpg",
        "p11.jpg",
        "p13.jpg",
        "p14.jpg",
        "p15.jpg",
        "p17.jpg",
    ]
    kinds = [
        pq.read_schema(pa.BufferReader(data)).field("caption").type
        for path, data in objects(bucket, "parquet").items()
        if path.startswith("data/")
    ]
    assert kinds == [pa.string(), pa.string()], "large_string became string in those days"


def test_a_lost_dataset_json_of_an_old_dataset_is_made_by_its_rules(bucket: str) -> None:
    url = f"{bucket}/out/files/_vitray/dataset.json"
    old = open_dataset(f"{bucket}/out/files")
    store_for(url).delete([url])
    assert vitray.run(job_of(bucket, "files")).exit_code == 0
    new = open_dataset(f"{bucket}/out/files")
    assert old is not None and new is not None and new.fingerprint == old.fingerprint


def test_a_backfill_of_an_old_dataset_has_the_same_shards(bucket: str) -> None:
    from vitray.operations.backfilling import next_job

    vitray.run(job_of(bucket, "tars"))
    job = next_job(job_of(bucket, "tars"), f"{bucket}/model", f"{bucket}/out/next")
    assert vitray.run(job).exit_code == 0
    names = {path for path in objects(bucket, "tars") if path.startswith("data/")}
    assert {path for path in objects(bucket, "next") if path.startswith("data/")} == names
    footers = [read_footer(f"{bucket}/out/next/{path}") for path in sorted(names)]
    assert [footer.total for footer in footers] == [4, 2, 2] and {
        footer.source_rules for footer in footers
    } == {1}
