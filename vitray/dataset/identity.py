"""dataset.json: the fingerprint of a dataset and the values that its first run froze."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa

from vitray.errors import JobError, ObjectMissing, StorageError, one_line
from vitray.job import Job, make_job
from vitray.schema import (
    LABEL_FIELDS,
    SCHEMA_VERSION,
    DecodeSpec,
    ModelSpec,
    PixelSpec,
    ScoreFunction,
    VectorColumn,
    row_schema,
)
from vitray.storage import absolute, exists, join, read, store_for

# of the job, as they are; of the others some do not count, or count as what was resolved from them
DECIDING_FIELDS = (
    "decode",
    "formats",
    "max_pixels",
    "background",
    "image_member",
    "image_column",
    "key_column",
    "allow",
)
MOVING = (
    "source",
    "format",
    "since",
    "sample",
    "limit",
)  # of the job: where its images are, and which of them
# whose versions decide numbers and behaviour
PACKAGES = "vitray ray torch transformers openvino onnxruntime pyarrow pillow simplejpeg s3fs numpy"


@dataclass(frozen=True)
class Dataset:
    """One output directory and all that decides its numbers."""

    out: str
    job: Job
    spec: ModelSpec
    vectors: tuple[VectorColumn, ...]
    passthrough: pa.Schema
    fragment_rows: int
    is_new: bool = field(default=False, compare=False)  # whether this process has made dataset.json

    @property
    def schema(self) -> pa.Schema:
        return row_schema(self.job.labelled, list(self.vectors), self.passthrough)

    @property
    def decode_spec(self) -> DecodeSpec:
        hexes = self.job.background
        colour = (
            None
            if hexes is None
            else (int(hexes[1:3], 16), int(hexes[3:5], 16), int(hexes[5:7], 16))
        )
        return DecodeSpec(
            self.spec.pixels,
            tuple(self.job.formats),
            self.job.max_pixels,
            colour,
            self.job.decode,
            self.job.rules,
        )

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()

    def deciding(self) -> dict[str, Any]:
        """Everything that decides the numbers, by name: what the fingerprint hashes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "weights": self.spec.weights_sha256,
            "labels": [self.job.labelled, self.spec.labels_sha256(), self.spec.multi_label],
            "processor": asdict(self.spec.pixels),
            "embeddings": [asdict(v) for v in self.vectors],
            "top_k": self.job.top_k if self.job.labelled else 0,
            "keep": [[f.name, str(f.type)] for f in self.passthrough],
            "precision": self.spec.precision,
            "engine": self.spec.engine,
            # absent where there are none: datasets that were begun before there were any go on
            **(
                {"prompts": [*self.spec.prompts, self.spec.text_sha256]}
                if self.spec.prompts
                else {}
            ),
            **(
                {"score_function": "none"} if self.spec.score_function is ScoreFunction.NONE else {}
            ),
            **({"head": [self.spec.head_sha256, self.spec.head_column]} if self.spec.head else {}),
            **self._source_rules(),
            **{name: getattr(self.job, name) for name in DECIDING_FIELDS},
        }

    def _source_rules(self) -> dict[str, Any]:
        """Absent where they are those of a dataset that was begun before there were any."""
        rules = {"source_rules": self.job.rules} if self.job.rules > 1 else {}
        return rules | ({"tar_keys": self.job.tar_keys} if self.job.tar_keys != "auto" else {})

    def label_columns(self, ids: np.ndarray, scores: np.ndarray) -> dict[str, pa.Array]:
        """LABEL_FIELDS of ids int [N, k] and scores [N, k], best first."""
        said, (n, k) = np.array(self.spec.labels, dtype=object)[ids], ids.shape
        offsets = pa.array(np.arange(0, n * k + 1, k), pa.int32())
        columns = [(said, pa.string()), (ids, pa.int32()), (scores, pa.float32())]
        best = [pa.array(values[:, 0], kind) for values, kind in columns]
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind))
            for values, kind in columns
        ]
        return dict(zip([f.name for f in LABEL_FIELDS], best + lists))

    def data_url(self, shard_id: str) -> str:
        return join(self.out, "data", f"{shard_id}.parquet")

    @property
    def errors_folder(self) -> str:
        """The folder of the error rows. Readers of a directory skip names that begin with an
        underscore.
        """
        return "errors" if self.job.rules == 1 else "_errors"

    def errors_url(self, shard_id: str) -> str:
        return join(self.out, self.errors_folder, f"{shard_id}.parquet")

    def staging_url(self, shard_id: str) -> str:
        return join(self.out, "_vitray", "staging", shard_id)


def dataset_url(out: str) -> str:
    """The URL of dataset.json."""
    return join(absolute(out), "_vitray", "dataset.json")


@dataclass(frozen=True, slots=True)
class LastSource:
    """What the last run found in its source. kind: of its shards, None where no run has told.

    left_out: files without a row, by left_out.LEFT_OUT. suffixes: those files by suffix.
    """

    kind: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)


def open_dataset(out: str) -> Dataset | None:
    """The dataset in a directory, with the source of its last run; None when there is none. Needs
    neither torch nor Ray.
    """
    try:
        text = read(dataset_url(out))
    except ObjectMissing:
        return None
    try:
        document = json.loads(text)
        return _from_json(absolute(out), _with_last_source(out, document))
    except (ValueError, KeyError, TypeError, RecursionError, JobError) as error:
        raise StorageError(
            f"{dataset_url(out)} is not readable ({one_line(error)[:160]}). If another version of "
            f"vitray wrote it, use that one. "
            "Else bring a copy of it back, or move it away and run the same job again: it is made "
            "anew and checked against "
            "the data files."
        ) from error


def _with_last_source(out: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document with the source of the last run, where that is readable."""
    moved = {name: value for name, value in _read_source(out).items() if name in MOVING}
    with contextlib.suppress(JobError):
        make_job({"source_rules": 1, **document["job"], **moved})
        return {**document, "job": {**document["job"], **moved}}
    return document


def restore_dataset(dataset: Dataset) -> None:
    """Make dataset.json exist, where another process took it away meanwhile."""
    if not exists(dataset_url(dataset.out)):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        store_for(dataset.out).create(dataset_url(dataset.out), to_json(dataset, now))


def last_source(out: str) -> LastSource:
    """What the last run in this directory found in its source."""
    document = _read_source(out)
    kind, left_out, suffixes = (document.get(name) for name in ("kind", "left_out", "suffixes"))
    return LastSource(kind if isinstance(kind, str) else None, _counts(left_out), _counts(suffixes))


def _counts(value: object) -> dict[str, int]:
    return (
        {str(name): int(count) for name, count in value.items()} if isinstance(value, dict) else {}
    )


def remember_source(dataset: Dataset, found: LastSource, begins: bool = False) -> None:
    """Where the images are may be another place each time: what comes after a run goes by the last
    one.

    A limit stays while all runs had one. begins: write it in any case, so that its time tells when
    a run began.
    """
    existing = open_dataset(dataset.out)
    if existing is None:
        return
    old, new = (
        {name: job.model_dump(mode="json")[name] for name in MOVING}
        for job in (existing.job, dataset.job)
    )
    new |= {name: None for name in ("since", "sample", "limit") if old[name] is None}
    if begins or {**new, **asdict(found)} != {**old, **asdict(last_source(dataset.out))}:
        document = json.dumps({**new, **asdict(found)}, indent=1).encode()
        store_for(dataset.out).replace(source_url(dataset.out), document)


def _read_source(out: str) -> dict[str, Any]:
    """source.json; nothing where there is none that is ours."""
    with contextlib.suppress(StorageError, ValueError, RecursionError):
        found = json.loads(read(source_url(out)))
        if isinstance(found, dict):
            return found
    return {}


def source_url(out: str) -> str:
    """The URL of source.json."""
    return join(absolute(out), "_vitray", "source.json")


def to_json(dataset: Dataset, now: str) -> bytes:
    document = {
        "fingerprint": dataset.fingerprint,
        "deciding": dataset.deciding(),
        "job": dataset.job.model_dump(mode="json"),
        "facts": asdict(dataset.spec),
        "key_is_found": dataset.job.key_is_found,
        "vectors": [asdict(v) for v in dataset.vectors],
        "kept": base64.b64encode(dataset.passthrough.serialize().to_pybytes()).decode(),
        "fragment_rows": dataset.fragment_rows,
        "created": now,
        "versions": package_versions(),
    }
    return json.dumps(document, indent=1).encode()


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names on which two deciding() do not agree, in the order of `new`."""
    old, new = json.loads(
        json.dumps([old, new])
    )  # one of them may come from JSON, which has no tuples
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


def _from_json(out: str, document: dict[str, Any]) -> Dataset:
    spec = _with_tuples(document["facts"])
    spec["pixels"] = PixelSpec(**_with_tuples(spec["pixels"]))
    dataset = Dataset(
        out=out,
        job=_job_of(document),
        spec=ModelSpec(**spec),
        vectors=tuple(VectorColumn(**v) for v in document["vectors"]),
        passthrough=pa.ipc.read_schema(pa.py_buffer(base64.b64decode(document["kept"]))),
        fragment_rows=int(document["fragment_rows"]),
    )
    if document["fingerprint"] != dataset.fingerprint:
        names = differing(document["deciding"], dataset.deciding())
        raise ValueError(f"its fingerprint is another one today: {', '.join(sorted(names))}")
    return dataset


def _job_of(document: dict[str, Any]) -> Job:
    """The job of dataset.json; datasets begun before December 2026 say nothing of source rules."""
    job = make_job({"source_rules": 1, **document["job"]})
    return job.with_found_key(job.key_column) if document.get("key_is_found") else job


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in dict(fields).items()
    }


def package_versions() -> dict[str, str]:
    """Versions of PACKAGES, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
