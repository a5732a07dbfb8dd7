"""One dataset has one fingerprint: what differs is refused and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from support.dataset_parts import FACTS, NOW, VECTOR, job_for, make, stored
from vitray.dataset import dataset_url, open_dataset, resolve_dataset, with_frozen
from vitray.errors import FingerprintError, StorageError
from vitray.job import Job, make_job
from vitray.schema import ModelSpec, VectorColumn
from vitray.storage import read as read_object
from vitray.storage import store_for

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
