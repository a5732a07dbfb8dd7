"""One dataset has one fingerprint: what differs is refused and named."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pytest

from support.dataset_parts import (
    FACTS,
    KEPT,
    NOW,
    VECTOR,
    D,
    commit,
    input_shard,
    job_for,
    make,
    stored,
)
from vitray.dataset import Dataset, dataset_url, open_dataset, resolve_dataset
from vitray.errors import FingerprintError
from vitray.schema import VectorColumn
from vitray.storage import exists, store_for
from vitray.storage import read as read_object


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
    assert document["deciding"] == json.loads(json.dumps(resolved.fingerprint_fields()))


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


def test_files_of_another_job_without_their_dataset_json_are_refused(out: str) -> None:
    other = make(out, top_k=2)
    commit(other, input_shard(out), 6)
    store_for(out).delete([dataset_url(out)])
    with pytest.raises(FingerprintError, match=r"holds 1 file of another job .* such as cats-"):
        make(out, top_k=3)
    assert not exists(dataset_url(out))
    assert make(out, top_k=2).fingerprint == other.fingerprint
