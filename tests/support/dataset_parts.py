"""Fragments, shards and jobs of a dataset without a model, and what is stored of them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import hand_made
from support.s3 import new_bucket
from support.s3_proxy import Proxy, proxied
from vitray.dataset import Commit, Dataset, commit_shard, resolve_dataset, write_end, write_fragment
from vitray.job import Job, make_job
from vitray.schema import ERROR_SCHEMA, End, Shard, VectorColumn, content_hash, short_hash
from vitray.storage import exists, join, store_for
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


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


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


def names_of(out: str, part: str) -> list[str]:
    return [name for name in stored(out) if part in name]


def success(out: str) -> dict[str, Any] | None:
    url = join(out, "_SUCCESS.json")
    return json.loads(read_object(url)) if exists(url) else None
