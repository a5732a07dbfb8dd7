"""Datasets made before December 2026 open, validate and go on as they were begun: see
data/make_dataset_v1.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import KEYS

import vitray
from vitray.dataset import open_dataset, read_footer
from vitray.errors import JobError
from vitray.job import Job
from vitray.operations.planning import plan, status
from vitray.operations.validation import validate
from vitray.storage import read, store_for

DATA = Path(__file__).parent / "data" / "dataset-v1"
BUCKET = "vitray-v1"  # the datasets hold its URLs, and etags, which are the same everywhere
FIRST = {
    "tars": (2, 4, 2),
    "parquet": (1, 3, 1),
    "files": (1, 2, 1),
    "manifest": (1, 1, 2),
}  # shards, rows, errors
FIELDS: dict[str, dict[str, object]] = {
    "tars": {"source": "in/tars/*.tar", "keep": "cls"},
    "parquet": {"source": "in/parquet", "keep": "id,caption"},
    "files": {"source": "in/files"},
    "manifest": {"source": "in/manifest", "format": "manifest", "key_column": "key"},
}


@pytest.fixture
def bucket(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": mock_s3}.items():
        monkeypatch.setenv(name, value)
    s3 = boto3.client("s3", endpoint_url=mock_s3)
    s3.create_bucket(Bucket=BUCKET)
    keys = [str(path.relative_to(DATA)) for path in sorted(DATA.rglob("*")) if path.is_file()]
    for key in keys:
        s3.put_object(Bucket=BUCKET, Key=key, Body=(DATA / key).read_bytes())
    yield f"s3://{BUCKET}"
    store_for(f"s3://{BUCKET}").delete_tree(f"s3://{BUCKET}")
    s3.delete_bucket(Bucket=BUCKET)


def job_of(bucket: str, name: str, **more: object) -> Job:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 4,
        "fragment_rows": 2,
        "max_error_rate": 1,
        "compile": "off",
    }
    fields = {**base, **FIELDS[name], **more}
    return Job(
        **{
            **fields,
            "source": f"{bucket}/{fields['source']}",
            "model": f"{bucket}/model",
            "out": f"{bucket}/out/{name}",
        }
    )


def objects(bucket: str, name: str) -> dict[str, bytes]:
    """Data files and error files, by their names below the dataset."""
    out = f"{bucket}/out/{name}/"
    urls = [info.url for info in store_for(out).find(out)]
    return {
        url.removeprefix(out): read(url)
        for url in urls
        if url.endswith(".parquet") and "/_vitray/" not in url
    }


def rows(bucket: str, name: str) -> list[dict[str, object]]:
    tables = [
        pq.ParquetFile(pa.BufferReader(data)).read()
        for path, data in sorted(objects(bucket, name).items())
        if path.startswith("data/")
    ]
    return [row for table in tables for row in table.to_pylist()]


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


@pytest.mark.parametrize("name", FIRST)
def test_an_old_dataset_goes_on_by_its_own_rules(bucket: str, name: str) -> None:
    old_objects, labelled = objects(bucket, name), {row["key"]: row for row in rows(bucket, name)}
    result = vitray.run(job_of(bucket, name))
    assert (result.exit_code, result.committed, result.pending) == (0, 1, 0)
    new_objects = objects(bucket, name)
    assert old_objects.items() <= new_objects.items() and not any(
        path.startswith("_errors/") for path in new_objects
    )
    checked = validate(result.out, content=True)
    assert checked.ok and checked.pending == 0, checked
    assert labelled.items() <= {row["key"]: row for row in rows(bucket, name)}.items()
    assert vitray.run(job_of(bucket, name)).committed == 0
    with pytest.raises(JobError, match="top_k differs"):
        vitray.run(job_of(bucket, name, top_k=2))


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


def test_the_data_holds_no_path_of_a_machine() -> None:
    for path in DATA.rglob("*.json"):
        assert os.sep + "work" not in path.read_text() and os.sep + "root" not in path.read_text()
