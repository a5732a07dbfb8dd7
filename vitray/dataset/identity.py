"""dataset.json: the fingerprint of a dataset and the values that its first run froze."""

from __future__ import annotations

import base64
import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa

from vitray.errors import ObjectMissing, StorageError
from vitray.job import Job, make_job
from vitray.schema import SCHEMA_VERSION, DecodeSpec, ModelFacts, PixelSpec, VectorColumn, row_schema
from vitray.storage import absolute, join, read

DECODE_MODE = "exact"


@dataclass(frozen=True)
class Dataset:
    """One output directory and all that decides its numbers."""

    out: str
    job: Job
    facts: ModelFacts
    vectors: tuple[VectorColumn, ...]
    kept: pa.Schema
    fragment_rows: int

    @property
    def schema(self) -> pa.Schema:
        return row_schema(self.job.labels, list(self.vectors), self.kept)

    @property
    def decode_spec(self) -> DecodeSpec:
        hexes = self.job.background
        colour = None if hexes is None else (int(hexes[1:3], 16), int(hexes[3:5], 16), int(hexes[5:7], 16))
        return DecodeSpec(self.facts.pixels, tuple(self.job.formats), self.job.max_pixels, colour)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()

    def deciding(self) -> dict[str, Any]:
        """Everything that decides the numbers, by name: what the fingerprint hashes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "weights": self.facts.weights_sha256,
            "labels": [self.job.labels, self.facts.labels_sha256(), self.facts.multi_label],
            "processor": asdict(self.facts.pixels),
            "embeddings": [asdict(v) for v in self.vectors],
            "top_k": self.job.top_k if self.job.labels else 0,
            "keep": [[f.name, str(f.type)] for f in self.kept],
            "precision": self.facts.precision,
            "engine": self.facts.engine,
            "decode": DECODE_MODE,
            "formats": list(self.job.formats),
            "max_pixels": self.job.max_pixels,
            "background": self.job.background,
            "image_member": self.job.image_member,
            "image_column": self.job.image_column,
            "key_column": self.job.key_column,
            "allow": list(self.job.allow),
        }

    def data_url(self, shard_id: str) -> str:
        return join(self.out, "data", f"{shard_id}.parquet")

    def errors_url(self, shard_id: str) -> str:
        return join(self.out, "errors", f"{shard_id}.parquet")

    def staging_url(self, shard_id: str) -> str:
        return join(self.out, "_vitray", "staging", shard_id)


def dataset_url(out: str) -> str:
    """The URL of dataset.json."""
    return join(absolute(out), "_vitray", "dataset.json")


def open_dataset(out: str) -> Dataset | None:
    """The dataset in a directory, None when there is none. Needs neither torch nor Ray."""
    try:
        text = read(dataset_url(out))
    except ObjectMissing:
        return None
    try:
        return _from_json(absolute(out), json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{dataset_url(out)} is not readable ({error}). Was it written by another version?") from error


def to_json(dataset: Dataset, now: str) -> bytes:
    document = {
        "fingerprint": dataset.fingerprint,
        "deciding": dataset.deciding(),
        "job": dataset.job.model_dump(mode="json"),
        "facts": asdict(dataset.facts),
        "vectors": [asdict(v) for v in dataset.vectors],
        "kept": base64.b64encode(dataset.kept.serialize().to_pybytes()).decode(),
        "fragment_rows": dataset.fragment_rows,
        "created": now,
        "versions": package_versions(),
    }
    return json.dumps(document, indent=1).encode()


def _from_json(out: str, document: dict[str, Any]) -> Dataset:
    dataset = _as_written(out, document)
    if document["fingerprint"] != dataset.fingerprint:
        now = json.loads(json.dumps(dataset.deciding()))
        names = [name for name in document["deciding"].keys() | now.keys() if document["deciding"].get(name) != now.get(name)]
        raise ValueError(f"its fingerprint is another one today: {', '.join(sorted(names))}")
    return dataset


def _as_written(out: str, document: dict[str, Any]) -> Dataset:
    facts = dict(document["facts"])
    pixels: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.pop("pixels").items()}
    facts["labels"] = tuple(facts["labels"])
    return Dataset(
        out=out,
        job=make_job(document["job"]),
        facts=ModelFacts(pixels=PixelSpec(**pixels), **facts),
        vectors=tuple(VectorColumn(**v) for v in document["vectors"]),
        kept=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(document["kept"]))),
        fragment_rows=int(document["fragment_rows"]),
    )


def package_versions() -> dict[str, str]:
    """Versions of what decides numbers and behaviour."""
    found = {"python": platform.python_version()}
    for name in ("vitray", "ray", "torch", "transformers", "pyarrow", "pillow", "s3fs", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
