"""What an output directory promises: one fingerprint, each shard in it exactly once, and a ledger
that says so.

No model and no Ray: rows are drawn, and so are crashes; what a killed run leaves behind is files,
made here by hand.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import duckdb
import hand_made
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import new_bucket
from hand_made import finish_with
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_proxy import FORWARD, LOSE, Call, Proxy, proxied

from vitray.dataset import (
    NO_GROUP,
    Commit,
    Dataset,
    RowsDigest,
    append_group_log,
    base_of,
    check_data,
    clean,
    commit_shard,
    committed,
    data_files,
    dataset_url,
    finish,
    forget,
    load_group_log,
    open_dataset,
    read,
    read_footer,
    read_fragment,
    read_manifest,
    read_run_records,
    resolve_dataset,
    shards_to_redo,
    staged,
    staged_intact,
    staged_shards,
    unmark_success,
    with_frozen,
    write_end,
    write_fragment,
    write_run_record,
)
from vitray.errors import (
    CommitError,
    FingerprintError,
    JobError,
    ObjectChanged,
    SourceError,
    StorageError,
)
from vitray.job import Job, make_job
from vitray.schema import (
    ERROR_SCHEMA,
    End,
    ModelSpec,
    Shard,
    VectorColumn,
    content_hash,
    short_hash,
)
from vitray.storage import exists, is_local, join, sha256_of, store_for
from vitray.storage import read as read_object

FACTS = replace(hand_made.spec_of("tests/drawn"), revision="c0ffee")
D = FACTS.dimension
VECTOR = VectorColumn("embedding", D, None, "cls", False, "float32")
KEPT = pa.schema([("caption", pa.string()), ("stars", pa.int16())])
NOW = "2026-01-01T00:00:00Z"
Bad = dict[int, str]


def job_for(out: str, **fields: object) -> Job:
    return make_job(
        {"source": "s", "model": "tests/drawn", "out": out, "fragment_rows": 4, **fields}
    )


def make(out: str, **fields: object) -> Dataset:
    return resolve_dataset(job_for(out, **fields), FACTS, [VECTOR], pa.schema([]), NOW)


@pytest.fixture
def out(root: str) -> str:
    return join(root, "out")


@pytest.fixture(params=["local", "mock"])
def quick_out(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """OUT on a disk and on the mock, where the promise hangs on our logic and not on what a real
    store answers.
    """
    if request.param == "local":
        return str(tmp_path / "out")
    return join(new_bucket(request.getfixturevalue("mock_s3"), monkeypatch), "out")


@pytest.fixture
def local_out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def input_shard(out: str, name: str = "cats", body: bytes = b"a tar, let us say") -> Shard:
    """A shard whose input lies beside OUT; another body is another version of it."""
    url = join(out.rpartition("/")[0], "in", f"{name}.tar")
    store_for(url).replace(url, body)
    info = store_for(url).stat(url)
    return Shard(
        f"{name}-{short_hash(url)}-{short_hash(info.version, 8)}",
        "tar",
        url,
        info.size,
        info.version,
    )


def vector(index: int) -> np.ndarray:
    return np.random.default_rng(index).standard_normal(D).astype(np.float32)


def rows_of(dataset: Dataset, shard: str, indexes: Iterable[int]) -> pa.Table:
    """Good rows, each value drawn from its index."""
    row_dicts: list[dict[str, object]] = []
    for i in indexes:
        row: dict[str, object] = {
            "key": f"{shard}/{i}",
            "shard": shard,
            "index": i,
            "uri": f"s3://in/{shard}.tar",
            "width": 100 + i,
            "height": 200 + i,
            "format": ("jpeg", "png", "webp")[i % 3],
            "content_hash": content_hash(b"%d" % i),
            "label": FACTS.labels[i % 3],
            "label_id": i % 3,
            "score": 1 / (i + 2),
            "top_labels": [FACTS.labels[i % 3], FACTS.labels[(i + 1) % 3]],
            "top_ids": [i % 3, (i + 1) % 3],
            "top_scores": [1 / (i + 2), 1 / (i + 3)],
            "caption": None if i % 4 == 1 else f"caption {i}",
            "stars": None if i % 5 == 2 else i,
        }
        row.update({v.column: vector(i).astype(v.dtype) for v in dataset.vectors})
        row_dicts.append({name: row[name] for name in dataset.schema.names})
    return pa.Table.from_pylist(row_dicts, schema=dataset.schema)


def errors_of(shard: str, bad: Bad) -> pa.Table:
    row_dicts = [
        {"key": f"{shard}/{i}", "shard": shard, "index": i, "uri": f"s3://in/{shard}.tar", "reason": reason, "message": f"no. {i}",
         "content_hash": content_hash(b"%d" % i), "size_bytes": i}
        for i, reason in sorted(bad.items())
    ]  # fmt: skip
    return pa.Table.from_pylist(row_dicts, schema=ERROR_SCHEMA)


def stage(
    dataset: Dataset,
    shard: Shard,
    total: int,
    bad: Bad | None = None,
    truncated_at: int | None = None,
) -> None:
    """All fragments of a shard, last one first, and its end."""
    stage_fragments(dataset, shard, total, bad or {})
    write_end(dataset, shard.id, End(total, truncated_at))


def stage_fragments(dataset: Dataset, shard: Shard, total: int, bad: Bad) -> None:
    for start in reversed(range(0, total, 4)):
        span = range(start, min(start + 4, total))
        rows = rows_of(dataset, shard.id, [i for i in span if i not in bad])
        wrong = errors_of(shard.id, {i: bad[i] for i in span if i in bad})
        write_fragment(dataset, shard.id, (span.start, span.stop), rows, wrong)


def commit(dataset: Dataset, shard: Shard, total: int, bad: Bad | None = None) -> Commit:
    stage(dataset, shard, total, bad)
    done = commit_shard(dataset, shard)
    assert done is not None and not done.adopted
    return done


def data_table(dataset: Dataset, shard: Shard) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(read_object(dataset.data_url(shard.id)))).read()


def error_table(dataset: Dataset, shard: Shard) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(read_object(dataset.errors_url(shard.id)))).read()


def stored(out: str) -> dict[str, str]:
    """Everything below OUT, with its etag, or size and mtime."""
    return {info.url.removeprefix(out + "/"): info.version for info in store_for(out).find(out)}


def staging(dataset: Dataset) -> list[str]:
    return [name for name in stored(dataset.out) if name.startswith("_vitray/staging/")]


def copy_file(dataset: Dataset, source: str, target: str) -> None:
    store_for(dataset.out).replace(target, read_object(source))


# ---- identity


def test_a_dataset_opens_as_it_was_made(out: str) -> None:
    vectors = [VECTOR, VectorColumn("embedding_m", D, 1, "mean", True, "float16")]
    job = job_for(
        out,
        keep=["caption", "stars"],
        background="#ffeedd",
        top_k=2,
        formats=["png", "jpg"],
        max_pixels=999,
    )
    resolved = resolve_dataset(job, FACTS, vectors, KEPT, NOW)
    existing = open_dataset(out)
    assert (
        existing is not None
        and existing.fingerprint == resolved.fingerprint
        and len(resolved.fingerprint) == 64
    )
    assert (existing.job, existing.spec, existing.vectors, existing.fragment_rows) == (
        resolved.job,
        FACTS,
        tuple(vectors),
        4,
    )
    assert (
        existing.passthrough.equals(KEPT)
        and existing.schema.equals(resolved.schema)
        and existing.decode_spec == resolved.decode_spec
    )
    document = json.loads(read_object(dataset_url(out)))
    assert document["fingerprint"] == resolved.fingerprint and document["created"] == NOW
    assert document["deciding"] == json.loads(json.dumps(resolved.deciding()))


def test_a_dataset_from_before_decode_was_a_field_keeps_its_fingerprint(out: str) -> None:
    new = make(out)
    document = json.loads(read_object(dataset_url(out)))
    assert document["job"].pop("decode") == document["deciding"]["decode"] == "exact"
    store_for(out).replace(dataset_url(out), json.dumps(document).encode())
    existing = open_dataset(out)
    assert (
        existing is not None
        and existing.fingerprint == new.fingerprint
        and existing.decode_spec.mode == "exact"
    )


def test_no_dataset_is_none(out: str) -> None:
    assert open_dataset(out) is None


CHANGES: dict[str, Callable[[str], tuple[Job, ModelSpec, list[VectorColumn], pa.Schema]]] = {
    "weights": lambda out: (
        job_for(out),
        replace(FACTS, weights_sha256="cd" * 32),
        [VECTOR],
        pa.schema([]),
    ),
    "labels": lambda out: (
        job_for(out),
        replace(FACTS, labels=("cat", "dog", "fox")),
        [VECTOR],
        pa.schema([]),
    ),
    "processor": lambda out: (
        job_for(out),
        replace(FACTS, pixels=replace(FACTS.pixels, resample=2)),
        [VECTOR],
        pa.schema([]),
    ),
    "embeddings": lambda out: (job_for(out), FACTS, [replace(VECTOR, pool="mean")], pa.schema([])),
    "top_k": lambda out: (job_for(out, top_k=3), FACTS, [VECTOR], pa.schema([])),
    "keep": lambda out: (
        job_for(out, keep=["caption"]),
        FACTS,
        [VECTOR],
        pa.schema([("caption", pa.string())]),
    ),
    "precision": lambda out: (
        job_for(out, precision="bf16"),
        replace(FACTS, precision="bf16"),
        [VECTOR],
        pa.schema([]),
    ),
    "engine": lambda out: (
        job_for(out, engine="onnx"),
        replace(FACTS, engine="onnx"),
        [VECTOR],
        pa.schema([]),
    ),
    "decode": lambda out: (job_for(out, decode="fast"), FACTS, [VECTOR], pa.schema([])),
    "formats": lambda out: (job_for(out, formats=["jpeg"]), FACTS, [VECTOR], pa.schema([])),
    "max_pixels": lambda out: (job_for(out, max_pixels=7), FACTS, [VECTOR], pa.schema([])),
    "background": lambda out: (job_for(out, background="#000000"), FACTS, [VECTOR], pa.schema([])),
    "image_member": lambda out: (job_for(out, image_member="png"), FACTS, [VECTOR], pa.schema([])),
    "image_column": lambda out: (job_for(out, image_column="img"), FACTS, [VECTOR], pa.schema([])),
    "key_column": lambda out: (job_for(out, key_column="id"), FACTS, [VECTOR], pa.schema([])),
    "allow": lambda out: (job_for(out, allow=["s3://x/"]), FACTS, [VECTOR], pa.schema([])),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_job_is_refused_and_the_field_named(local_out: str, field: str) -> None:
    own = make(local_out)
    files = stored(local_out)
    with pytest.raises(FingerprintError) as caught:
        resolve_dataset(*CHANGES[field](local_out), NOW)
    text = str(caught.value)
    assert text.count(" differs (") == 1 and f"{field} differs (" in text
    assert own.fingerprint[:8] in text and "Choose another `out`" in text
    assert (
        field != "weights" or f"… of {FACTS.model}, this job: cdcdcdcd… of {FACTS.model})" in text
    )
    assert stored(local_out) == files


def test_every_differing_field_is_named(local_out: str) -> None:
    make(local_out)
    with pytest.raises(
        FingerprintError,
        match=r"top_k differs \(5, this job: 2\); precision differs \(fp32, this job: fp16\)",
    ):
        resolve_dataset(
            job_for(local_out, top_k=2, precision="fp16"),
            replace(FACTS, precision="fp16"),
            [VECTOR],
            pa.schema([]),
            NOW,
        )


def test_auto_adopts_what_the_first_run_froze(local_out: str) -> None:
    first = make(local_out)
    later = resolve_dataset(
        make_job(
            {"source": "elsewhere", "model": "tests/drawn", "out": local_out, "stall_timeout_s": 5}
        ),
        replace(FACTS, precision="bf16", engine="openvino", batch_size=256),
        [VECTOR],
        pa.schema([]),
        "later",
    )
    assert later.fingerprint == first.fingerprint
    frozen = (later.spec.precision, later.spec.engine, later.spec.batch_size, later.fragment_rows)
    assert frozen == ("fp32", "torch", 4, 4)
    assert json.loads(read_object(dataset_url(local_out)))["created"] == NOW


def test_a_job_takes_over_what_was_frozen_before_its_model_is_looked_at(local_out: str) -> None:
    assert with_frozen(job_for(local_out)).engine == "auto"  # nothing is there
    resolve_dataset(
        job_for(local_out),
        replace(FACTS, precision="fp32", engine="onnx", batch_size=5),
        [VECTOR],
        pa.schema([]),
        NOW,
    )
    job = with_frozen(job_for(local_out, batch_size=7))
    assert (job.precision, job.engine, job.batch_size) == ("fp32", "onnx", 7)


def test_what_a_job_says_itself_is_not_adopted(local_out: str) -> None:
    make(local_out)
    resolved = resolve_dataset(
        job_for(local_out, batch_size=7), replace(FACTS, batch_size=7), [VECTOR], pa.schema([]), NOW
    )
    assert resolved.spec.batch_size == 7, "a batch size decides no number"
    with pytest.raises(FingerprintError, match="precision differs"):
        resolve_dataset(
            job_for(local_out, precision="bf16"),
            replace(FACTS, precision="bf16"),
            [VECTOR],
            pa.schema([]),
            NOW,
        )


def test_the_fields_of_labels_do_not_count_without_labels(tmp_path: Path) -> None:
    one, two = (make(str(tmp_path / "o"), labels=False, top_k=k) for k in (2, 5))
    assert one.fingerprint == two.fingerprint and "label" not in one.schema.names


def test_two_runs_that_start_at_once_share_one_dataset_json(out: str) -> None:
    gate = threading.Barrier(2)

    def start(precision: str) -> Dataset:
        gate.wait()
        return resolve_dataset(
            job_for(out), replace(FACTS, precision=precision), [VECTOR], pa.schema([]), precision
        )

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(start, ("bf16", "fp32"))
    document = json.loads(read_object(dataset_url(out)))
    assert one.fingerprint == two.fingerprint == document["fingerprint"]
    assert one.spec.precision == two.spec.precision == document["created"]
    assert list(stored(out)) == ["_vitray/dataset.json"]


def test_a_dataset_of_another_version_is_refused(local_out: str) -> None:
    dataset = make(local_out)
    document = json.loads(read_object(dataset_url(local_out)))
    for text in (
        json.dumps(
            {
                **document,
                "deciding": {**document["deciding"], "schema_version": 99},
                "fingerprint": "99" * 32,
            }
        ),
        json.dumps({"fingerprint": dataset.fingerprint}),
        "no json",
    ):
        store_for(local_out).replace(dataset_url(local_out), text.encode())
        with pytest.raises(StorageError, match="another version"):
            open_dataset(local_out)


# ---- staging


def test_a_fragment_is_read_as_written_and_written_once(out: str) -> None:
    dataset = make(out)
    rows, bad = rows_of(dataset, "s", [0, 2, 3]), errors_of("s", {1: "empty"})
    assert write_fragment(dataset, "s", (0, 4), rows, bad) is True
    assert (
        write_fragment(
            dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 2, 3]), errors_of("s", {})
        )
        is False
    )
    fragment = read_fragment(dataset, "s", 0, 4)
    assert fragment is not None and fragment[0].equals(rows) and fragment[1].equals(bad)
    assert list(stored(out)) == [
        "_vitray/dataset.json",
        "_vitray/staging/s/0000000000-0000000004.arrow",
    ]


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ([0, 1, 2], []),
        ([0, 1, 2, 4], []),
        ([0, 1, 2, 3], [3]),
        ([1, 0, 2, 3], []),
        ([0, 1, 2, 2], []),
        ([], []),
    ],
)
def test_a_fragment_with_other_indexes_is_refused(
    local_out: str, good: list[int], bad: list[int]
) -> None:
    dataset = make(local_out)
    with pytest.raises(ValueError, match=r"do not make up \(0, 4\)"):
        write_fragment(
            dataset,
            "s",
            (0, 4),
            rows_of(dataset, "s", good),
            errors_of("s", dict.fromkeys(bad, "empty")),
        )
    assert staged(dataset, "s").fragments == {}


def test_staged_tells_ranges_ends_and_whether_they_tile(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    assert not staged(dataset, shard.id).covers() and staged_shards(dataset) == []
    stage_fragments(dataset, shard, 10, {})
    assert not staged(dataset, shard.id).covers(), "no end yet"
    write_end(dataset, shard.id, End(10, 512, "cut"))
    parts = staged(dataset, shard.id)
    assert (
        list(parts.ranges()) == [(0, 4), (4, 8), (8, 10)]
        and parts.ends == (End(10, 512, "cut"),)
        and parts.covers()
    )
    store_for(local_out).delete(
        [join(dataset.staging_url(shard.id), "0000000004-0000000008.arrow")]
    )
    assert not staged(dataset, shard.id).covers()
    assert staged_shards(dataset) == [shard.id]


def test_an_end_is_written_once(local_out: str) -> None:
    dataset = make(local_out)
    write_end(dataset, "s", End(4, None, "first"))
    write_end(dataset, "s", End(4, 9, "second"))
    assert staged(dataset, "s").ends == (End(4, None, "first"),)


def test_every_damaged_fragment_is_deleted(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    stage(dataset, shard, 20)
    other = replace(dataset, spec=replace(FACTS, precision="bf16"))
    write_fragment(
        other, "other", (4, 8), rows_of(dataset, shard.id, range(4, 8)), errors_of(shard.id, {})
    )
    url = join(dataset.staging_url(shard.id), "{:010d}-{:010d}.arrow").format
    content = read_object(url(0, 4))
    copy_file(dataset, join(dataset.staging_url("other"), "0000000004-0000000008.arrow"), url(4, 8))
    store_for(quick_out).replace(url(8, 12), content)
    store_for(quick_out).replace(url(12, 16), content[: len(content) // 2])
    parts = staged_intact(dataset, shard.id)
    assert (
        list(parts.ranges()) == [(0, 4), (16, 20)]
        and parts.ends == (End(20),)
        and not parts.covers()
    )
    assert staged(dataset, shard.id) == parts
    stage_fragments(dataset, shard, 20, {})
    assert staged_intact(dataset, shard.id).covers()


def test_a_fragment_with_any_bit_flipped_is_no_fragment(local_out: str) -> None:
    dataset = make(local_out)
    write_fragment(
        dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 3]), errors_of("s", {2: "empty"})
    )
    url = Path(join(dataset.staging_url("s"), "0000000000-0000000004.arrow"))
    content = url.read_bytes()
    for at in range(0, len(content), 53):
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << at % 8
        url.write_bytes(spoilt)
        assert read_fragment(dataset, "s", 0, 4) is None


def test_a_fragment_cut_at_any_byte_is_no_fragment(local_out: str) -> None:
    dataset = make(local_out)
    write_fragment(
        dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 3]), errors_of("s", {2: "empty"})
    )
    url = join(dataset.staging_url("s"), "0000000000-0000000004.arrow")
    content = Path(url).read_bytes()
    for cut in {*range(0, len(content), 97), 1, 7, 8, 9, len(content) - 1}:
        Path(url).write_bytes(content[:cut])
        assert read_fragment(dataset, "s", 0, 4) is None
    Path(url).write_bytes(content)
    assert read_fragment(dataset, "s", 0, 4) is not None


def test_a_damaged_end_is_deleted_and_written_again(local_out: str) -> None:
    dataset = make(local_out)
    write_end(dataset, "s", End(4, 77))
    url = join(dataset.staging_url("s"), "end-4.arrow")
    content = Path(url).read_bytes()
    for damaged in (b"", content[:9], content[: len(content) // 2]):
        Path(url).write_bytes(damaged)
        assert staged(dataset, "s").ends == ()
        assert staged_intact(dataset, "s").ends == () and not exists(url)
        write_end(dataset, "s", End(4, 77))
        assert staged(dataset, "s").ends == (End(4, 77),)


def test_a_fragment_beyond_the_end_does_not_block_the_shard(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage_fragments(
        dataset, shard, 8, {}
    )  # a reader that died, and had seen more rows than the one that came after
    write_end(dataset, shard.id, End(6))
    assert list(staged_intact(dataset, shard.id).ranges()) == [(0, 4)]
    stage_fragments(dataset, shard, 6, {})
    done = commit_shard(dataset, shard)
    assert done is not None and done.rows == 6


def test_a_fragment_apart_behind_the_end_is_not_committed(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    write_fragment(
        dataset,
        shard.id,
        (12, 16),
        rows_of(dataset, shard.id, range(12, 16)),
        errors_of(shard.id, {}),
    )
    stage(dataset, shard, 8)  # the reader that died had decoded 12-16 before 8-12
    assert not staged(dataset, shard.id).covers() and commit_shard(dataset, shard) is None
    assert staged_intact(dataset, shard.id).covers()
    done = commit_shard(dataset, shard)
    assert (
        done is not None
        and done.rows == 8
        and data_table(dataset, shard)["index"].to_pylist() == list(range(8))
    )


# ---- commit


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


def test_a_shard_without_a_good_row_has_the_same_schema(local_out: str) -> None:
    job = job_for(local_out, keep=["caption", "stars"])
    dataset = resolve_dataset(job, FACTS, [VECTOR], KEPT, NOW)
    full, empty, bad = (input_shard(local_out, name) for name in ("full", "empty", "bad"))
    commit(dataset, full, 5)
    assert commit(dataset, empty, 0) == Commit(empty.id, 0, 0, {}, None, False)
    wrong = dict.fromkeys(range(5), "not_an_image")
    assert commit(dataset, bad, 5, wrong) == Commit(bad.id, 0, 5, {"not_an_image": 5}, None, False)
    tables = [data_table(dataset, shard) for shard in (full, empty, bad)]
    assert [t.num_rows for t in tables] == [5, 0, 0]
    assert all(t.schema.remove_metadata().equals(dataset.schema) for t in tables)
    assert error_table(dataset, bad).equals(errors_of(bad.id, wrong)) and not exists(
        dataset.errors_url(empty.id)
    )
    assert read_footer(dataset.data_url(empty.id)).rows_sha256 == hashlib.sha256().hexdigest()
    assert read(local_out).num_rows == 5


def test_a_truncated_shard_is_committed_with_that_verdict(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 5, {4: "truncated"}, truncated_at=12_345)
    assert commit_shard(dataset, shard) == Commit(shard.id, 4, 1, {"truncated": 1}, 12_345, False)
    assert read_footer(dataset.data_url(shard.id)).truncated_at == 12_345
    ledger = finish_with(dataset, [shard.id], [shard.id])
    assert ledger.truncated == {shard.id: 12_345}


def test_kept_columns_and_float16_vectors_arrive(local_out: str) -> None:
    vectors = [VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16")]
    dataset = resolve_dataset(
        job_for(local_out, keep=["caption", "stars"]), FACTS, vectors, KEPT, NOW
    )
    shard = input_shard(local_out)
    commit(dataset, shard, 9, {3: "empty"})
    table, good = read(local_out), [0, 1, 2, 4, 5, 6, 7, 8]
    assert table["caption"].to_pylist() == [None if i % 4 == 1 else f"caption {i}" for i in good]
    assert table["stars"].to_pylist() == [None if i % 5 == 2 else i for i in good]
    half = np.stack(table["embedding_h"].to_numpy())
    assert half.dtype == np.float16 and np.array_equal(
        half, np.stack([vector(i) for i in good]).astype(np.float16)
    )
    assert table.schema.field("embedding_h").type == dataset.schema.field("embedding_h").type


def test_a_second_commit_adopts_the_first(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    first = commit(dataset, shard, 6, {1: "empty"})
    files = stored(out)
    assert commit_shard(dataset, shard) == replace(first, adopted=True)
    assert stored(out)[f"data/{shard.id}.parquet"] == files[f"data/{shard.id}.parquet"]
    assert stored(out).keys() == files.keys()


def test_a_link_that_was_made_and_then_refused_is_a_commit(
    local_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client of NFS sees when the answer to its first request was lost and the second finds
    the name taken.
    """
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    dataset, shard = make(local_out), input_shard(local_out)
    monkeypatch.setattr(os, "link", twice)
    first = commit(dataset, shard, 6, {1: "empty"})
    assert (first.rows, first.errors) == (5, 1)
    assert data_table(dataset, shard)["index"].to_pylist() == [0, 2, 3, 4, 5]
    assert error_table(dataset, shard)["index"].to_pylist() == [1] and staging(dataset) == []


def test_missing_fragments_are_no_commit(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    assert commit_shard(dataset, shard) is None
    stage_fragments(dataset, shard, 8, {})
    assert commit_shard(dataset, shard) is None, "the end is not known"
    write_end(dataset, shard.id, End(12))
    assert commit_shard(dataset, shard) is None
    assert committed(local_out) == {} and len(staging(dataset)) == 3, "what is staged stays"


def test_readers_that_disagree_on_the_end_start_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 8)
    write_end(dataset, shard.id, End(6, 100))
    assert commit_shard(dataset, shard) is None
    assert staging(dataset) == [] and committed(local_out) == {}
    assert commit(dataset, shard, 8).rows == 8


def test_a_damaged_fragment_is_not_committed_and_is_made_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 8)
    url = Path(dataset.staging_url(shard.id)) / "0000000004-0000000008.arrow"
    url.write_bytes(url.read_bytes()[:-500])
    assert commit_shard(dataset, shard) is None
    assert committed(local_out) == {}
    assert list(staged_intact(dataset, shard.id).ranges()) == [(0, 4)]
    assert commit(dataset, shard, 8).rows == 8


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def damaged_parquet() -> bytes:
    body = bytearray(parquet_bytes(pa.table({"a": list(range(100))})))
    body[-200:-20] = b"\x7f" * 180
    return bytes(body)


@pytest.mark.parametrize(
    "body",
    [b"", b"not Parquet", parquet_bytes(pa.table({"a": [1]})), damaged_parquet()],
    ids=["empty", "text", "foreign", "damaged"],
)
def test_a_foreign_file_in_place_is_an_error_and_stays(local_out: str, body: bytes) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 4)
    store_for(local_out).replace(dataset.data_url(shard.id), body)
    with pytest.raises(
        CommitError, match=r"is not a data file of vitray.*Move it away and run again\.$"
    ):
        commit_shard(dataset, shard)
    assert read_object(dataset.data_url(shard.id)) == body and staged(dataset, shard.id).covers()


def test_a_file_of_another_fingerprint_is_an_error(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    other = replace(dataset, spec=replace(FACTS, precision="bf16"))
    commit(other, shard, 4)
    content = read_object(dataset.data_url(shard.id))
    stage(dataset, shard, 4)
    with pytest.raises(
        CommitError, match=rf"fingerprint {other.fingerprint[:8]}.*{dataset.fingerprint[:8]}"
    ):
        commit_shard(dataset, shard)
    assert read_object(dataset.data_url(shard.id)) == content


def test_files_of_another_job_without_their_dataset_json_are_refused(out: str) -> None:
    other = make(out, top_k=2)
    commit(other, input_shard(out), 6)
    store_for(out).delete([dataset_url(out)])
    with pytest.raises(FingerprintError, match=r"holds 1 files of another job .* such as cats-"):
        make(out, top_k=3)
    assert not exists(dataset_url(out))
    assert make(out, top_k=2).fingerprint == other.fingerprint


def test_a_file_of_another_job_put_into_data_is_refused_by_finish(
    local_out: str, tmp_path: Path
) -> None:
    own, other = make(local_out), make(str(tmp_path / "other"), top_k=2)
    shard = input_shard(local_out)
    commit(other, shard, 6)
    store_for(local_out).create(own.data_url(shard.id), read_object(other.data_url(shard.id)))
    with pytest.raises(FingerprintError, match="of another job"):
        finish_with(own, [shard.id], [shard.id])
    assert not exists(join(local_out, "_SUCCESS.json"))


def test_a_data_file_under_the_name_of_another_shard_is_refused(local_out: str) -> None:
    dataset = make(local_out)
    cats, dogs = input_shard(local_out), input_shard(local_out, "dogs")
    for shard in (cats, dogs):
        commit(dataset, shard, 6, {1: "empty"})
    finish_with(dataset, [cats.id, dogs.id], [cats.id, dogs.id])
    files = stored(local_out)
    store_for(local_out).replace(dataset.data_url(cats.id), read_object(dataset.data_url(dogs.id)))
    changed = stored(local_out)
    for check in (
        lambda: check_data(dataset),
        lambda: finish_with(dataset, [cats.id, dogs.id], [cats.id, dogs.id]),
    ):
        with pytest.raises(CommitError, match=f"{cats.id}.parquet holds shard dogs-"):
            check()
    assert stored(local_out) == changed != files


def test_finish_removes_the_staging_that_a_slower_run_left(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 6)
    stage_fragments(dataset, shard, 6, {})
    finish_with(dataset, [shard.id], [shard.id])
    assert staged_shards(dataset) == []


def test_a_file_of_another_shard_is_an_error(local_out: str) -> None:
    dataset, one, two = (
        make(local_out),
        input_shard(local_out, "one"),
        input_shard(local_out, "two"),
    )
    commit(dataset, one, 4)
    copy_file(dataset, dataset.data_url(one.id), dataset.data_url(two.id))
    with pytest.raises(CommitError):
        commit_shard(dataset, two)


def test_a_changed_or_deleted_input_is_not_committed(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 4)
    store_for(out).replace(shard.url, b"another body, another length")
    with pytest.raises(ObjectChanged, match=r"cats\.tar"):
        commit_shard(dataset, shard)
    store_for(out).delete([shard.url])
    with pytest.raises(ObjectChanged, match=r"cats\.tar"):
        commit_shard(dataset, shard)
    assert committed(out) == {}


def test_eight_runs_commit_one_object(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 9, {3: "empty"})
    gate = threading.Barrier(8)

    def run(_: int) -> Commit | None:
        gate.wait()
        return commit_shard(dataset, shard)

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(run, range(8)))
    commits = [c for c in done if c is not None]
    assert len(commits) == 8, "the file exists: nobody may plan the shard again"
    assert sum(not c.adopted for c in commits) == 1
    assert {(c.rows, c.errors) for c in commits} == {(8, 1)}
    assert sorted(stored(out)) == [
        f"_errors/{shard.id}.parquet",
        "_vitray/dataset.json",
        f"data/{shard.id}.parquet",
    ]
    assert data_table(dataset, shard)["index"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 8]


# ---- races and crashes inside a commit


@pytest.fixture
def proxy(mock_s3: str) -> Iterator[Proxy]:
    with proxied(mock_s3) as running:
        yield running


@pytest.fixture
def behind(proxy: Proxy, mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """OUT behind the proxy, staged, and a way for another run to commit meanwhile, which goes past
    the proxy.
    """
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    out = join(new_bucket(proxy.url, monkeypatch), "out")
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 9, {3: "empty"})
    proxy.calls.clear()
    return lambda: (dataset, shard)


def once(matches: Callable[[Call], bool], event: Callable[[], None]) -> Callable[[Call], int]:
    """A rule: before the first call that matches is forwarded, something happens."""
    waiting = [event]

    def rule(call: Call) -> int:
        if waiting and matches(call):
            waiting.pop()()
        return FORWARD

    return rule


def rival(
    proxy: Proxy,
    mock_s3: str,
    dataset: Dataset,
    shard: Shard,
    total: int = 9,
    bad: Bad | None = None,
) -> Callable[[], None]:
    """Another run: commits the shard with boto3's bytes of a commit made elsewhere, then cleans up,
    past the proxy.
    """
    bucket, _, prefix = dataset.out.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=mock_s3)

    def body() -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            copy = replace(dataset, out=folder)
            stage(copy, shard, total, {3: "empty"} if bad is None else bad)
            commit_shard(copy, shard)
            return read_object(copy.data_url(shard.id))

    result = body()

    def act() -> None:
        client.put_object(
            Bucket=bucket, Key=f"{prefix}/data/{shard.id}.parquet", Body=result, IfNoneMatch="*"
        )
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/_vitray/staging/").get(
            "Contents", []
        )
        for item in listed:
            client.delete_object(Bucket=bucket, Key=item["Key"])

    return act


WINDOWS: dict[str, Callable[[Call], bool]] = {
    "before the staging is listed": lambda call: (
        call.method == "GET" and "staging" in call.path and "list-type" in call.path
    ),
    "before the end is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("end-9.arrow")
    ),
    "before the first fragment is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("0000000004.arrow")
    ),
    "before the last fragment is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("0000000009.arrow")
    ),
    "before the input is looked at": lambda call: (
        call.method == "HEAD" and call.path.endswith("cats.tar")
    ),
    "before the create": lambda call: call.method == "PUT" and "/data/" in call.path,
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_run_that_is_overtaken_adopts(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str, window: str
) -> None:
    dataset, shard = behind()
    act = rival(proxy, mock_s3, dataset, shard)
    proxy.rule = once(WINDOWS[window], act)
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, True)
    assert sorted(stored(dataset.out)) == [
        f"_errors/{shard.id}.parquet",
        "_vitray/dataset.json",
        f"data/{shard.id}.parquet",
    ]


def test_an_overtaking_run_that_saw_another_total_is_an_error(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str
) -> None:
    dataset, shard = behind()
    proxy.rule = once(WINDOWS["before the create"], rival(proxy, mock_s3, dataset, shard, total=10))
    with pytest.raises(
        CommitError, match=rf"committed 10 images .*this one saw 9 .*vitray redo --shard {shard.id}"
    ):
        commit_shard(dataset, shard)


def test_an_overtaking_run_that_judged_an_image_otherwise_is_adopted_with_a_warning(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, shard = behind()
    proxy.rule = once(
        WINDOWS["before the create"],
        rival(proxy, mock_s3, dataset, shard, bad={3: "empty", 4: "time_limit"}),
    )
    with caplog.at_level(logging.WARNING, logger="vitray"):
        done = commit_shard(dataset, shard)
    assert done == Commit(shard.id, 7, 2, {"empty": 1, "time_limit": 1}, None, True)
    assert (
        f"{shard.id}: another run committed 2 errors, this one saw 1; the first stays"
        in caplog.text
    )
    assert error_table(dataset, shard)["index"].to_pylist() == [3, 4]


def test_a_commit_whose_answer_is_lost_knows_its_own(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    answers = iter([LOSE])
    proxy.rule = lambda call: (
        next(answers, FORWARD) if WINDOWS["before the create"](call) else FORWARD
    )
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, False)
    assert proxy.count("PUT", "/data/") == 2


def test_a_commit_that_is_never_answered_looks_before_it_gives_up(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    proxy.rule = lambda call: LOSE if WINDOWS["before the "
        "create"](call) and proxy.count("PUT", "/data/") == 1 else (
        503 if WINDOWS["before the create"](call) else FORWARD
    )  # fmt: skip
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, False)
    assert proxy.count("PUT", "/data/") in (10, 11), (
        "aiohttp repeats a PUT by itself when a kept connection drops"
    )


def test_a_commit_that_never_arrives_is_an_error_and_keeps_its_staging(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    proxy.rule = lambda call: 503 if WINDOWS["before the create"](call) else FORWARD
    with pytest.raises(StorageError, match=r"data/cats.*no answer in 10 attempts"):
        commit_shard(dataset, shard)
    assert staged(dataset, shard.id).covers() and committed(dataset.out) == {}
    proxy.rule = lambda call: FORWARD
    done = commit_shard(dataset, shard)
    assert done is not None and not done.adopted


def test_a_crash_before_errors_is_repaired_by_the_next_commit(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    first = commit(dataset, shard, 6, {1: "empty"})
    store_for(quick_out).delete([dataset.errors_url(shard.id)])
    stage(dataset, shard, 6, {1: "empty"})
    assert commit_shard(dataset, shard) == replace(first, adopted=True)
    assert (
        error_table(dataset, shard).equals(errors_of(shard.id, {1: "empty"}))
        and staging(dataset) == []
    )


def test_a_crash_before_clean_up_is_repaired_by_the_next_commit(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 6, {1: "empty"})
    write_fragment(
        dataset, shard.id, (4, 6), rows_of(dataset, shard.id, [4, 5]), errors_of(shard.id, {})
    )
    done = commit_shard(dataset, shard)
    assert done is not None and done.adopted and staging(dataset) == []


def test_a_crash_before_errors_is_repaired_by_finish(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 6, {1: "empty"})
    store_for(local_out).delete([dataset.errors_url(shard.id)])
    finish_with(dataset, [shard.id], [shard.id])
    assert error_table(dataset, shard).equals(errors_of(shard.id, {1: "empty"}))


# ---- the hash of the rows


def digest_of(tables: Iterable[pa.Table]) -> str:
    digest = RowsDigest()
    for table in tables:
        digest.add(table)
    return digest.hexdigest()


def wide_dataset() -> Dataset:
    vectors = (VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16"))
    return Dataset("/nowhere", job_for("/nowhere"), FACTS, vectors, KEPT, 4)


WIDE = rows_of(wide_dataset(), "s", range(2500))
WIDE_DIGEST = digest_of([WIDE])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2500), max_size=12))
def test_the_hash_of_rows_does_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 2500]
    assert digest_of(WIDE.slice(a, b - a) for a, b in itertools.pairwise(edges)) == WIDE_DIGEST


@pytest.mark.parametrize("row_group_size", [1, 7, 1023, 1025, 5000])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_hash_of_rows_survives_parquet(row_group_size: int, dictionary: bool) -> None:
    rows, sink = WIDE.slice(0, 40 if row_group_size == 1 else 2500), io.BytesIO()
    pq.write_table(rows, sink, row_group_size=row_group_size, use_dictionary=dictionary)
    file = pq.ParquetFile(sink)
    batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(batch_size=333))
    assert digest_of(batches) == digest_of([file.read()]) == digest_of([rows])


def test_the_hash_of_rows_does_not_depend_on_dictionaries_or_on_bytes_behind_a_null() -> None:
    no_dictionary = WIDE.set_column(6, "format", WIDE["format"].cast(pa.string()))
    turned = pa.DictionaryArray.from_arrays(
        pa.array([2 - i % 3 for i in range(2500)], pa.int8()), ["webp", "png", "jpeg"]
    )
    assert (
        digest_of([no_dictionary])
        == digest_of([WIDE.set_column(6, "format", turned)])
        == WIDE_DIGEST
    )
    valid, values = (
        pa.py_buffer(bytes([0b101])),
        pa.py_buffer(np.array([1, 99, 3], np.int16).tobytes()),
    )
    dirty = pa.Array.from_buffers(pa.int16(), 3, [valid, values])
    assert digest_of([pa.table({"a": dirty})]) == digest_of(
        [pa.table({"a": pa.array([1, None, 3], pa.int16())})]
    )


@pytest.mark.parametrize("name", WIDE.schema.names)
def test_the_hash_of_rows_changes_with_any_value(name: str) -> None:
    few = WIDE.slice(0, 1500)
    at, values = few.schema.get_field_index(name), few[name].to_pylist()
    for row in (0, 1499):
        old = values[row]
        if isinstance(old, list):
            new: object = [*old[:-1], old[0]] if name == "top_labels" else [*old[:-1], old[-1] + 1]
        elif isinstance(old, bytes):
            new = old[:-1] + bytes([old[-1] ^ 1])
        elif isinstance(old, str):
            new = "gif" if name == "format" else old + "!"
        else:
            new = (old or 0) + 1
        changed = pa.array([*values[:row], new, *values[row + 1 :]], few.schema.field(name).type)
        assert digest_of([few.set_column(at, few.schema.field(name), changed)]) != digest_of([few])
    assert digest_of([few.slice(1)]) != digest_of([few])


# ---- what other readers see


def test_vectors_are_split_by_bytes_and_have_no_dictionary(local_out: str) -> None:
    vectors = [VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16")]
    dataset = resolve_dataset(job_for(local_out), FACTS, vectors, pa.schema([]), NOW)
    shard = input_shard(local_out)
    commit(dataset, shard, 9)
    group = pq.read_metadata(dataset.data_url(shard.id)).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    for name in ("embedding.list.element", "embedding_h.list.element"):
        assert (
            "BYTE_STREAM_SPLIT" in columns[name].encodings and not columns[name].has_dictionary_page
        )
    assert columns["label"].has_dictionary_page
    names = list(columns)
    assert max(names.index(n) for n in names if "embedding" not in n) < min(
        names.index(n) for n in names if "embedding" in n
    )


def test_row_groups_are_of_the_size_that_was_measured(local_out: str) -> None:
    dataset = make(local_out, fragment_rows=8192)
    shard = input_shard(local_out)
    rows = rows_of(dataset, shard.id, range(8192))
    for n in range(3):
        index = pa.array(range(8192 * n, 8192 * (n + 1)), pa.int32())
        part = rows.set_column(2, dataset.schema.field("index"), index)
        write_fragment(dataset, shard.id, (8192 * n, 8192 * (n + 1)), part, errors_of(shard.id, {}))
    write_end(dataset, shard.id, End(3 * 8192))
    commit_shard(dataset, shard)
    meta = pq.read_metadata(dataset.data_url(shard.id))
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [16_384, 8_192]
    digest = RowsDigest()
    for batch in pq.ParquetFile(dataset.data_url(shard.id)).iter_batches(batch_size=5000):
        digest.add(pa.Table.from_batches([batch]))
    assert digest.hexdigest() == read_footer(dataset.data_url(shard.id)).rows_sha256


def test_duckdb_pandas_and_pyarrow_read_the_data(local_out: str) -> None:
    dataset = make(local_out)
    commit(dataset, input_shard(local_out, "a"), 7, {2: "empty"})
    commit(dataset, input_shard(local_out, "b"), 5)
    commit(dataset, input_shard(local_out, "c"), 0)
    files = f"{local_out}/data/*.parquet"
    query = vector(100)
    good = [0, 1, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    cosines = [
        float(vector(i) @ query / np.linalg.norm(vector(i)) / np.linalg.norm(query)) for i in good
    ]
    numbers = [float(x) for x in query]
    as_list = duckdb.execute(
        f"select index, list_cosine_similarity(embedding, $1) from '{files}' order by shard, index",
        [numbers],
    )
    rows = as_list.fetchall()
    assert [row[0] for row in rows] == good and np.allclose(
        [row[1] for row in rows], cosines, atol=1e-6
    )
    as_array = (
        f"select array_cosine_similarity(embedding::float[{D}], $1::float[{D}]) from '{files}' "
        f"order by shard, index"
    )
    assert np.allclose(
        [row[0] for row in duckdb.execute(as_array, [numbers]).fetchall()], cosines, atol=1e-6
    )
    frame = pd.concat([pd.read_parquet(path) for path in data_files(local_out)])
    assert frame["index"].tolist() == good and np.array_equal(
        np.stack(frame["embedding"]), np.stack([vector(i) for i in good])
    )
    import pyarrow.dataset as pads

    schema = pads.dataset(join(local_out, "data"), format="parquet").schema
    assert schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), D
    )
    assert schema.field("content_hash").type == pa.binary(16)


# ---- the ledger


def names_of(out: str, part: str) -> list[str]:
    return [name for name in stored(out) if part in name]


def success(out: str) -> dict[str, Any] | None:
    url = join(out, "_SUCCESS.json")
    return json.loads(read_object(url)) if exists(url) else None


def test_finish_writes_manifest_and_success(out: str) -> None:
    dataset, one, two = make(out), input_shard(out, "one"), input_shard(out, "two")
    commit(dataset, one, 6, {1: "empty"})
    commit(dataset, two, 4)
    ids = [two.id, one.id]
    ledger = finish_with(dataset, ids, ids)
    assert (
        ledger.shards,
        ledger.rows,
        ledger.errors,
        ledger.truncated,
        ledger.pending,
        ledger.gone,
    ) == (2, 9, 1, {}, 0, 0)
    assert names_of(out, "manifest-") == [f"_vitray/{ledger.manifest}"]
    assert success(out) == {
        "shards": 2, "rows": 9, "errors": 1, "truncated": 0, "gone": 0, "manifest": ledger.manifest,
        "fingerprint": dataset.fingerprint, "left_out": {},
    }  # fmt: skip
    manifest = read_manifest(out)
    assert manifest is not None
    for row, shard, (rows, errors) in zip(
        manifest.to_pylist(), (one, two), ((5, 1), (4, 0)), strict=True
    ):
        body = read_object(dataset.data_url(shard.id))
        etag = row.pop("etag")
        assert is_local(out) or etag == hashlib.md5(body).hexdigest()
        assert row == {
            "shard": shard.id, "url": shard.url, "source_version": shard.version, "path": f"data/{shard.id}.parquet",
            "size_bytes": len(body), "rows": rows, "errors": errors, "truncated_at": None,
            "sha256": hashlib.sha256(body).hexdigest(), "state": "current", "left_out": "{}", "image_members": "{}",
        }  # fmt: skip


def test_a_second_finish_writes_nothing(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    commit(dataset, shard, 6, {1: "empty"})
    first = finish_with(dataset, [shard.id], [shard.id])
    files = stored(out)
    assert finish_with(dataset, [shard.id], [shard.id]) == first
    assert stored(out) == files


def test_a_second_finish_sends_no_write_that_could_change_anything(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    commit_shard(dataset, shard)
    finish_with(dataset, [shard.id], [shard.id])
    proxy.calls.clear()
    finish_with(dataset, [shard.id], [shard.id])
    writes = [call for call in proxy.calls if call.method not in ("GET", "HEAD")]
    assert all(
        call.method == "PUT"
        and call.headers.get("if-none-match") == "*"
        and "/manifest-" in call.path
        for call in writes
    )


def test_manifest_and_success_are_the_same_bytes_when_made_again(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 6, {1: "empty"})
    commit(dataset, two, 4)
    ids = [one.id, two.id]
    first = finish_with(dataset, ids, ids)
    urls = [join(quick_out, "_SUCCESS.json"), join(quick_out, "_vitray", first.manifest)]
    contents = [read_object(url) for url in urls]
    store_for(quick_out).delete(urls)
    assert finish_with(dataset, list(reversed(ids)), ids) == first
    assert [read_object(url) for url in urls] == contents


def test_pending_shards_mean_no_success(local_out: str) -> None:
    dataset, one, two = (
        make(local_out),
        input_shard(local_out, "one"),
        input_shard(local_out, "two"),
    )
    commit(dataset, one, 4)
    ledger = finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert (ledger.pending, ledger.rows) == (1, 4) and success(local_out) is None
    assert names_of(local_out, "manifest-") == [f"_vitray/{ledger.manifest}"]
    assert finish_with(dataset, [one.id, two.id], [one.id]).pending == 0, (
        "`limit` left the other one local_out"
    )
    assert success(local_out) is not None
    finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert success(local_out) is None


def test_an_empty_dataset_can_be_finished(local_out: str) -> None:
    ledger = finish_with(make(local_out), [], [])
    assert (ledger.shards, ledger.rows, ledger.pending) == (0, 0, 0)


def test_a_superseded_version_stays_until_its_replacement_is_committed(quick_out: str) -> None:
    dataset, kept = make(quick_out), input_shard(quick_out, "kept")
    old = input_shard(quick_out, "photos", b"version 1")
    commit(dataset, old, 5, {0: "empty"})
    commit(dataset, kept, 4)
    finish_with(dataset, [old.id, kept.id], [old.id, kept.id])
    new = input_shard(quick_out, "photos", b"version 2, longer")
    listed = [new.id, kept.id]

    finish_with(dataset, listed, listed)
    assert set(committed(quick_out)) == {old.id, kept.id} and success(quick_out) is None
    finish_with(dataset, listed, [kept.id])
    assert set(committed(quick_out)) == {old.id, kept.id}, (
        "`limit` leaves the new version quick_out: the old one is all there is"
    )

    commit(dataset, new, 6)
    table = read(quick_out)
    assert len(set(table["shard"].to_pylist())) == 2, (
        "never two versions of an input, also before the manifest step"
    )
    finish_with(dataset, listed, listed)
    assert set(committed(quick_out)) == {new.id, kept.id} and not exists(dataset.errors_url(old.id))
    assert data_files(quick_out) == [dataset.data_url(shard) for shard in sorted(listed)]
    assert read(quick_out).num_rows == 10 and success(quick_out) is not None


def test_a_manifest_of_before_the_change_still_names_the_old_version(local_out: str) -> None:
    dataset, old = make(local_out), input_shard(local_out, "photos", b"version 1")
    commit(dataset, old, 4)
    finish_with(dataset, [old.id], [old.id])
    new = input_shard(local_out, "photos", b"version 2, longer")
    commit(dataset, new, 6)
    assert data_files(local_out) == [dataset.data_url(old.id)], (
        "the run that changes it has not come to its manifest step"
    )
    unmark_success(local_out)  # a manifest step that was killed after its first deletes
    store_for(local_out).delete([dataset.data_url(old.id)])
    assert data_files(local_out) == [dataset.data_url(new.id)]


def test_ranges_of_one_file_are_shards_of_one_version(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out, "rows")
    ranges = [
        replace(shard, id=shard.id.replace("rows-", f"rows-rg{n}-{n + 1}-"), start=n, stop=n + 1)
        for n in range(3)
    ]
    commit(dataset, ranges[0], 4)
    finish_with(dataset, [s.id for s in ranges], [s.id for s in ranges])
    commit(dataset, ranges[1], 4)
    assert data_files(local_out) == [dataset.data_url(s.id) for s in ranges[:2]], (
        "committed since the manifest: rows count at once"
    )
    commit(dataset, ranges[2], 4)
    assert read(local_out).num_rows == 12
    newer = input_shard(local_out, "rows", b"longer by far than it was")
    finish_with(dataset, [newer.id], [newer.id])
    assert len(committed(local_out)) == 3
    commit(dataset, newer, 5)
    finish_with(dataset, [newer.id], [newer.id])
    assert list(committed(local_out)) == [newer.id]


def test_a_gone_input_keeps_its_rows_until_prune(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 4)
    commit(dataset, two, 4, {0: "empty"})
    ledger = finish_with(dataset, [one.id], [one.id])
    assert (ledger.gone, ledger.shards, ledger.rows) == (1, 2, 7)
    manifest = read_manifest(quick_out)
    assert manifest is not None
    assert dict(zip(manifest["shard"].to_pylist(), manifest["state"].to_pylist())) == {
        one.id: "current",
        two.id: "gone",
    }
    assert read(quick_out).num_rows == 7
    ledger = finish_with(dataset, [one.id], [one.id], prune=True)
    assert (ledger.gone, ledger.shards, ledger.rows) == (0, 1, 4)
    assert list(committed(quick_out)) == [one.id] and names_of(quick_out, "_errors/") == [] and names_of(quick_out, "manifest-") == [
        f"_vitray/{ledger.manifest}"
    ]  # fmt: skip


def test_finish_repairs_errors_and_removes_what_belongs_to_nothing(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 4, {0: "empty"})
    commit(dataset, two, 4)
    first = finish_with(dataset, [one.id], [one.id])
    copy_file(
        dataset,
        join(quick_out, "_vitray", first.manifest),
        join(quick_out, "_vitray", "manifest-0123456789abcdef.parquet"),
    )
    copy_file(dataset, dataset.errors_url(one.id), dataset.errors_url(two.id))
    copy_file(dataset, dataset.errors_url(one.id), dataset.errors_url("never-0-0"))
    store_for(quick_out).delete([dataset.errors_url(one.id)])
    ledger = finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert names_of(quick_out, "_errors/") == [f"_errors/{one.id}.parquet"]
    assert error_table(dataset, one).equals(errors_of(one.id, {0: "empty"}))
    assert names_of(quick_out, "manifest-") == [f"_vitray/{ledger.manifest}"]


def test_a_data_file_deleted_by_hand_and_made_again_has_its_own_hash_in_the_manifest(
    quick_out: str,
) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    store_for(quick_out).delete([dataset.data_url(shard.id)])
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    manifest = read_manifest(quick_out)
    assert manifest is not None
    assert manifest["sha256"].to_pylist() == [
        hashlib.sha256(read_object(dataset.data_url(shard.id))).hexdigest()
    ]


def test_a_success_that_names_a_lost_manifest_is_healed(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 4)
    first = finish_with(dataset, [shard.id], [shard.id])
    store_for(quick_out).delete([join(quick_out, "_vitray", first.manifest)])
    assert read_manifest(quick_out) is None and read(quick_out).num_rows == 4
    assert (
        finish_with(dataset, [shard.id], [shard.id]) == first
        and read_manifest(quick_out) is not None
    )


@pytest.mark.parametrize("name", ["part", "part-0", "a-b-c-d"])
def test_a_foreign_file_in_data_is_named(local_out: str, name: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 4)
    store_for(local_out).create(dataset.data_url(name), parquet_bytes(pa.table({"a": [1]})))
    with pytest.raises(CommitError, match=rf"data/{name}\.parquet is not a data file of vitray"):
        finish_with(dataset, [shard.id], [shard.id])
    assert exists(dataset.data_url(name)) and success(local_out) is None


def test_a_name_with_manifest_in_it_is_no_manifest(quick_out: str) -> None:
    out = join(quick_out, "manifest-run")
    dataset, done, underway = (
        make(out),
        input_shard(out, "manifest-done"),
        input_shard(out, "manifest-2026"),
    )
    commit(dataset, done, 4)
    stage_fragments(dataset, underway, 8, {})
    append_group_log(out, [(0, "s3://b/a")])
    files = set(stored(out))
    ledger = finish_with(dataset, [done.id, underway.id], [done.id, underway.id])
    assert finish_with(dataset, [done.id, underway.id], [done.id, underway.id]) == ledger
    assert set(stored(out)) == files | {f"_vitray/{ledger.manifest}"}
    forget(dataset, [])
    assert set(stored(out)) == files
    assert clean(dataset, [underway.id]) == [] and set(stored(out)) == files


def test_a_path_is_in_one_group_for_ever(out: str) -> None:
    assert load_group_log(out) == []
    members, rivals = [(0, "s3://b/a"), (0, "s3://b/b")], [(0, "s3://b/b"), (0, "s3://b/c")]
    assert append_group_log(out, members) is True
    assert append_group_log(out, rivals) is False, "planned before the first append was read"
    assert append_group_log(out, [(0, "s3://b/z")]) is False, "groups never grow"
    assert append_group_log(out, [(1, "s3://b/a")]) is False
    assert load_group_log(out) == members
    assert append_group_log(out, [(1, "s3://b/c")]) is True
    assert load_group_log(out) == [*members, (1, "s3://b/c")]
    assert names_of(out, "shards/") == [
        "_vitray/shards/000000.parquet",
        "_vitray/shards/000001.parquet",
    ]


def test_a_path_leaves_its_group_once_and_may_enter_another(out: str) -> None:
    log = [(0, "a"), (0, "b"), (NO_GROUP, "a"), (1, "a"), (1, "c")]
    for members in (log[:2], log[2:3], log[3:]):
        assert append_group_log(out, members) is True
    for refused in ([(NO_GROUP, "x")], [(2, "a")], [(0, "x")], [(NO_GROUP, "b"), (NO_GROUP, "b")]):
        assert append_group_log(out, refused) is False, refused
    assert append_group_log(out, [(NO_GROUP, "a"), (NO_GROUP, "b")]) is True
    assert append_group_log(out, [(1, "a")]) is False, "groups never grow"
    log += [(NO_GROUP, "a"), (NO_GROUP, "b")]
    assert load_group_log(out) == log
    copy = join(out, "copy")
    assert append_group_log(copy, log) is True and load_group_log(copy) == log, (
        "as backfill and relabel do"
    )


def test_of_eight_appends_at_once_one_is_accepted(out: str) -> None:
    gate = threading.Barrier(8)

    def append(n: int) -> bool:
        gate.wait()
        return append_group_log(out, [(0, f"s3://b/{n}")])

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(append, range(8)))
    assert won.count(True) == 1 and load_group_log(out) == [(0, f"s3://b/{won.index(True)}")]


def test_run_records_come_back_in_order(local_out: str) -> None:
    dataset = make(local_out)
    for run in ("20260102-b", "20260101-a"):
        write_run_record(dataset, run, {"run": run, "images_per_s": 1.5})
    assert [record["run"] for record in read_run_records(local_out)] == ["20260101-a", "20260102-b"]


def test_redo_by_shard_and_by_reason(local_out: str) -> None:
    dataset = make(local_out)
    one, two, three = (input_shard(local_out, name) for name in ("one", "two", "three"))
    commit(dataset, one, 4, {0: "time_limit", 1: "empty"})
    commit(dataset, two, 4, {3: "empty"})
    commit(dataset, three, 4)
    ids = [one.id, two.id, three.id]
    finish_with(dataset, ids, ids)
    assert shards_to_redo(dataset, [], ["time_limit"]) == [one.id]
    assert shards_to_redo(dataset, [], ["empty"]) == sorted([one.id, two.id])
    assert shards_to_redo(dataset, [three.id], ["time_limit"]) == sorted([one.id, three.id])
    assert shards_to_redo(dataset, [], ["missing"]) == shards_to_redo(dataset, [], []) == []
    with pytest.raises(JobError, match=r"holds no shard nope\. Ids are"):
        shards_to_redo(dataset, ["nope"], [])
    forget(dataset, [one.id])
    assert set(committed(local_out)) == {two.id, three.id} and success(local_out) is None
    assert (
        names_of(local_out, "_errors/") == [f"_errors/{two.id}.parquet"]
        and names_of(local_out, "manifest-") == []
    )
    commit(dataset, one, 4)
    assert finish_with(dataset, ids, ids).errors == 1


def test_clean_removes_orphans_only(quick_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(quick_out)
    done, unlisted, underway = (
        input_shard(quick_out, name) for name in ("done", "unlisted", "underway")
    )
    commit(dataset, done, 4, {0: "empty"})
    finish_with(dataset, [done.id, underway.id], [done.id, underway.id])
    committed_files = set(stored(quick_out))
    stage_fragments(dataset, underway, 8, {})
    working = set(stored(quick_out))
    stage(dataset, done, 4)
    stage(dataset, unlisted, 8)
    store_for(quick_out).create(nonce := join(quick_out, "_vitray", "probe-12ab"), b"vitray probe")
    assert clean(dataset, [done.id, underway.id]) == sorted([done.id, unlisted.id])
    assert set(stored(quick_out)) == working | {
        nonce.removeprefix(f"{quick_out}/")
    }  # a run may be at work with it
    monkeypatch.setattr("vitray.dataset.scratch_space.ABANDONED_S", -60)
    assert clean(dataset, [done.id, underway.id]) == ["_vitray/probe-12ab"]
    assert set(stored(quick_out)) == working and len(working - committed_files) == 2
    assert clean(dataset, [done.id, underway.id]) == []


def test_what_a_killed_plan_left_is_taken_for_nothing(local_out: str) -> None:
    """Its scratch holds whole datasets of the sample."""
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    inside = make(f"{local_out}/_vitray/probe-12ab/64/out")
    other = input_shard(inside.out, "dogs")
    commit(inside, other, 4, {0: "empty"})
    stage(inside, input_shard(inside.out, "emus"), 4)
    finish_with(inside, [other.id], [other.id])
    append_group_log(inside.out, [(0, "u")])
    write_run_record(inside, "r", {"run": "r"})
    assert (
        set(committed(local_out)) == {shard.id}
        and staged_shards(dataset) == []
        and read_run_records(local_out) == []
    )
    assert [row["shard"] for row in read_manifest(local_out).to_pylist()] == [
        shard.id
    ] and load_group_log(local_out) == []
    assert len(read(local_out)) == 4 and finish_with(dataset, [shard.id], [shard.id]).rows == 4
    assert {entry.name for entry in os.scandir(f"{local_out}/_vitray/probe-12ab/64/out")} == {
        "data",
        "_errors",
        "_vitray",
        "_SUCCESS.json",
    }


def test_read_gives_rows_in_the_order_of_shards_and_the_columns_asked_for(local_out: str) -> None:
    dataset = make(local_out)
    with pytest.raises(SourceError, match="no committed shard"):
        read(local_out)
    b, a = input_shard(local_out, "b"), input_shard(local_out, "a")
    commit(dataset, b, 5, {2: "empty"})
    commit(dataset, a, 6)
    ids = sorted([a.id, b.id])
    table = read(local_out, columns=["index", "shard", "format"])
    assert list(zip(table["shard"].to_pylist(), table["index"].to_pylist())) == [
        *((a.id, i) for i in range(6)), *((b.id, i) for i in (0, 1, 3, 4)),
    ]  # fmt: skip
    assert table["format"].to_pylist() == [
        ("jpeg", "png", "webp")[i % 3] for i in [0, 1, 2, 3, 4, 5, 0, 1, 3, 4]
    ]
    assert set(table.column_names) == {"index", "shard", "format"}
    finish_with(dataset, ids, ids)
    all_rows = read(local_out)
    assert all_rows.schema.equals(dataset.schema) and data_files(local_out) == [
        dataset.data_url(s) for s in ids
    ]
    assert all_rows.drop_columns(["format"]).equals(
        pa.concat_tables(
            [rows_of(dataset, a.id, range(6)), rows_of(dataset, b.id, [0, 1, 3, 4])]
        ).drop_columns(["format"])
    )


def test_a_file_made_anew_under_a_clock_that_went_back_is_hashed_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)

    def list_ids() -> tuple[list[str], list[str]]:
        return [shard.id], [shard.id]

    commit(dataset, shard, 6)
    first = finish(dataset, list_ids)
    os.utime(f"{local_out}/_vitray/{first.manifest}", (time.time() + 7200,) * 2)
    os.remove(dataset.data_url(shard.id))
    commit(dataset, shard, 6)
    finish(dataset, list_ids, fresh={shard.id})
    assert read_manifest(local_out)["sha256"].to_pylist() == [sha256_of(dataset.data_url(shard.id))]


# ---- the manifest step beside other runs


def test_a_version_that_was_committed_after_the_listing_is_not_removed(quick_out: str) -> None:
    """A lists the old version; the input changes, another run commits the new one; A goes on."""
    dataset, old = make(quick_out), input_shard(quick_out)
    commit(dataset, old, 6)
    later: list[Shard] = []

    def list_ids() -> tuple[list[str], list[str]]:
        if later:
            return [later[0].id], [later[0].id]
        later.append(input_shard(quick_out, body=b"another tar, as it is now"))
        commit(dataset, later[0], 4)
        return [old.id], [old.id]

    ledger = finish(dataset, list_ids)
    assert committed(quick_out).keys() == {later[0].id}
    assert (ledger.rows, ledger.pending) == (4, 0) and read_manifest(quick_out)[
        "shard"
    ].to_pylist() == [later[0].id]


def test_an_input_that_arrived_after_the_listing_is_not_pruned(quick_out: str) -> None:
    dataset, one = make(quick_out), input_shard(quick_out)
    commit(dataset, one, 6)
    ids = [one.id]

    def list_ids() -> tuple[list[str], list[str]]:
        listed = list(ids)
        if len(ids) == 1:
            arrived = input_shard(quick_out, "dogs")
            commit(dataset, arrived, 4)
            ids.append(arrived.id)
        return listed, listed

    assert finish(dataset, list_ids, prune=True).shards == 2 and committed(quick_out).keys() == set(
        ids
    )


def test_a_listing_that_never_knows_what_others_commit_removes_nothing_and_says_so(
    local_out: str,
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)

    def list_ids() -> tuple[list[str], list[str]]:
        commit(dataset, input_shard(local_out, f"new-{len(committed(local_out))}"), 2)
        return [shard.id], [shard.id]

    with pytest.raises(StorageError, match="another run committed"):
        finish(dataset, list_ids, prune=True)
    assert len(committed(local_out)) == 4 and not os.path.exists(join(local_out, "_SUCCESS.json"))


def test_a_manifest_that_another_run_replaces_while_it_is_read_is_looked_for_again(
    quick_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitray.dataset import ledger

    dataset, one = make(quick_out), input_shard(quick_out)
    commit(dataset, one, 6)
    finish_with(dataset, [one.id], [one.id])
    real, chances = ledger.read_parquet, iter([True])

    def overtaken(url: str) -> pa.Table:
        if next(chances, False):
            commit(dataset, input_shard(quick_out, "dogs"), 4)
            two = sorted(committed(quick_out))
            finish_with(dataset, two, two)
        return real(url)

    monkeypatch.setattr(ledger, "read_parquet", overtaken)
    assert read_manifest(quick_out)["rows"].to_pylist() == [6, 4]


def test_an_outdated_version_keeps_its_errors_and_its_place_in_the_manifest(quick_out: str) -> None:
    """Its input changed, and the new version is set aside, or left out by `limit`."""
    dataset, old = make(quick_out), input_shard(quick_out)
    commit(dataset, old, 6, {1: "empty"})
    new = input_shard(quick_out, body=b"changed")
    for planned, is_done in (([new.id], False), ([], True)):
        ledger = finish_with(dataset, [new.id], planned)
        assert (ledger.rows, ledger.errors, ledger.pending) == (5, 1, len(planned))
        assert read_manifest(quick_out).select(["shard", "state"]).to_pylist() == [
            {"shard": old.id, "state": "outdated"}
        ]
        assert (
            error_table(dataset, old).num_rows == 1
            and exists(join(quick_out, "_SUCCESS.json")) == is_done
        )
    commit(dataset, new, 4)
    assert finish_with(dataset, [new.id], [new.id]).rows == 4 and committed(quick_out).keys() == {
        new.id
    }


def test_inputs_whose_hashes_are_equal_are_two_where_their_names_differ() -> None:
    assert base_of("cats-0123456789-aaaaaaaa") == base_of("cats-rg0-4-0123456789-bbbbbbbb")
    assert base_of("cats-0123456789-aaaaaaaa") != base_of("dogs-0123456789-aaaaaaaa")
