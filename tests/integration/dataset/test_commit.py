"""A commit: rows in order, errors beside them, metadata, and what is not committed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.dataset_parts import (
    FACTS,
    NOW,
    VECTOR,
    commit,
    data_table,
    error_table,
    errors_of,
    input_shard,
    job_for,
    make,
    rows_of,
    stage,
    stored,
)
from vitray.dataset import (
    Commit,
    RowsDigest,
    commit_shard,
    committed_files,
    read_footer,
    resolve_dataset,
)
from vitray.errors import ObjectChanged
from vitray.storage import is_local, join, store_for
from vitray.storage import read as read_object


def test_a_commit_puts_rows_in_order_and_errors_beside_them(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    bad = {2: "truncated", 5: "empty", 10: "truncated"}
    stage(dataset, shard, 11, bad)
    assert commit_shard(dataset, shard) == Commit(
        shard.id, 8, 3, {"truncated": 2, "empty": 1}, None, False
    )
    good = [i for i in range(11) if i not in bad]
    table = data_table(dataset, shard)
    assert table.replace_schema_metadata(None).equals(rows_of(dataset, shard.id, good))
    assert table["index"].to_pylist() == good
    assert error_table(dataset, shard).equals(errors_of(shard.id, bad))
    footer = read_footer(dataset.data_url(shard.id))
    assert (footer.rows, footer.errors, footer.total, footer.reasons) == (
        8,
        3,
        11,
        {"truncated": 2, "empty": 1},
    )
    assert footer.error_rows.equals(errors_of(shard.id, bad))
    assert (footer.shard, footer.url, footer.source_version) == (shard.id, shard.url, shard.version)
    assert sorted(stored(out)) == [
        f"_errors/{shard.id}.parquet",
        "_vitray/dataset.json",
        f"data/{shard.id}.parquet",
    ]
    if is_local(out):
        assert not Path(dataset.staging_url(shard.id)).exists()


def test_footer_and_object_metadata_say_the_same(root: str) -> None:
    out = join(root, "out")
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 6, {1: "empty"}, truncated_at=4096)
    commit_shard(dataset, shard)
    body = read_object(dataset.data_url(shard.id))
    file = pq.ParquetFile(pa.BufferReader(body))
    digest = RowsDigest()
    digest.add(file.read())
    metadata = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
    expected = {
        "fingerprint": dataset.fingerprint,
        "left_out": "",
        "source_rules": "2",
        "rows": "5",
        "errors": "1",
        "truncated_at": "4096",
        "rows_sha256": digest.hexdigest(),
        "model": "tests/drawn",
        "revision": "c0ffee",
        "weights_sha256": "7" * 64,
        "id2label_sha256": hashlib.sha256(b"cat\0dog\0emu").hexdigest(),
        "dimension": "4",
        "precision": "fp32",
        "engine": "torch",
        "decode": "exact",
    }
    assert {name: metadata[f"vitray.{name}"] for name in expected} == expected and len(
        metadata["vitray.write_id"]
    ) == 32
    if not is_local(out):
        bucket, _, key = dataset.data_url(shard.id).removeprefix("s3://").partition("/")
        head = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).head_object(
            Bucket=bucket, Key=key
        )
        for name in ("write_id", "fingerprint", "rows", "errors", "truncated_at", "rows_sha256"):
            assert (
                head["Metadata"][f"vitray-{name.replace('_', '-')}"] == metadata[f"vitray.{name}"]
            )
        assert head["Metadata"]["vitray-sha256"] == hashlib.sha256(body).hexdigest()
        assert head["ETag"].strip('"') == hashlib.md5(body).hexdigest(), "one PUT"


def test_names_that_are_not_ascii_can_be_committed(root: str) -> None:
    out = join(root, "out")
    spec = replace(FACTS, model="/модель", revision=None)
    dataset = resolve_dataset(job_for(out), spec, [VECTOR], pa.schema([]), NOW)
    for shard in (input_shard(out, "фото"), input_shard(out, "two  spaces ")):
        commit(dataset, shard, 4)
        assert read_footer(dataset.data_url(shard.id)).url == shard.url


def test_a_second_commit_adopts_the_first(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    first = commit(dataset, shard, 6, {1: "empty"})
    files = stored(out)
    assert commit_shard(dataset, shard) == replace(first, adopted=True)
    assert stored(out)[f"data/{shard.id}.parquet"] == files[f"data/{shard.id}.parquet"]
    assert stored(out).keys() == files.keys()


def test_a_changed_or_deleted_input_is_not_committed(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 4)
    store_for(out).replace(shard.url, b"another body, another length")
    with pytest.raises(ObjectChanged, match=r"cats\.tar"):
        commit_shard(dataset, shard)
    store_for(out).delete([shard.url])
    with pytest.raises(ObjectChanged, match=r"cats\.tar"):
        commit_shard(dataset, shard)
    assert committed_files(out) == {}
