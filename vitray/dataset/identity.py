"""dataset.json: the fingerprint of a dataset and the values that its first run froze."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa

from vitray.clock import utc_now
from vitray.dataset.layout import data_url, dataset_url, errors_folder, source_url, staging_url
from vitray.dataset.pointer import read_pointer, refusal_of
from vitray.errors import JobError, ObjectMissing, ObjectRefused, StorageError, one_line
from vitray.job import Job, make_job
from vitray.schema import (
    LABEL_FIELDS,
    SCHEMA_VERSION,
    DecodeSpec,
    ModelOutputs,
    ModelSpec,
    PixelSpec,
    ScoreFunction,
    ShardKind,
    SourceRules,
    VectorColumn,
    row_schema,
)
from vitray.storage import absolute, exists, join, read, store_for

# fields of the job that count as they are; others do not count, or count as their resolved values
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
# fields of the job that say where its images are, and which of them it takes
SOURCE_FIELDS = ("source", "format", "since", "sample", "limit")
# packages whose versions decide numbers and behaviour
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
    def outputs(self) -> ModelOutputs:
        """What its model computes for each image."""
        return ModelOutputs(self.vectors, self.job.top_k if self.job.labelled else 0)

    @property
    def decode_spec(self) -> DecodeSpec:
        return DecodeSpec(
            pixels=self.spec.pixels,
            formats=tuple(self.job.formats),
            max_pixels=self.job.max_pixels,
            background=_colour_of(self.job.background),
            mode=self.job.decode,
            rules=self.job.rules,
        )

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.fingerprint_fields(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def fingerprint_fields(self) -> dict[str, Any]:
        """Everything that decides the numbers, by name: what the fingerprint hashes."""
        values: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "weights": self.spec.weights_sha256,
            "labels": [self.job.labelled, self.spec.labels_sha256(), self.spec.multi_label],
            "processor": asdict(self.spec.pixels),
            "embeddings": [asdict(v) for v in self.vectors],
            "top_k": self.job.top_k if self.job.labelled else 0,
            "keep": [[f.name, str(f.type)] for f in self.passthrough],
            "precision": self.spec.precision,
            "engine": self.spec.engine,
        }
        # names below are absent at their defaults: datasets older than these features go on
        if self.spec.prompts:
            values["prompts"] = [*self.spec.prompts, self.spec.text_sha256]
        if self.spec.score_function is ScoreFunction.NONE:
            values["score_function"] = "none"
        if self.spec.head:
            values["head"] = [self.spec.head_sha256, self.spec.head_column]
        if self.job.rules >= SourceRules.V2:
            values["source_rules"] = self.job.rules
        if self.job.tar_keys != "auto":
            values["tar_keys"] = self.job.tar_keys
        return values | {name: getattr(self.job, name) for name in DECIDING_FIELDS}

    def label_columns(self, ids: np.ndarray, scores: np.ndarray) -> dict[str, pa.Array]:
        """LABEL_FIELDS of ids int [N, k] and scores [N, k], best first."""
        labels = np.array(self.spec.labels, dtype=object)[ids]
        n, k = ids.shape
        offsets = pa.array(np.arange(0, n * k + 1, k), pa.int32())
        columns = [(labels, pa.string()), (ids, pa.int32()), (scores, pa.float32())]
        best = [pa.array(values[:, 0], kind) for values, kind in columns]
        lists = [
            pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), kind))
            for values, kind in columns
        ]
        return dict(zip([f.name for f in LABEL_FIELDS], best + lists))

    def data_url(self, shard_id: str) -> str:
        return data_url(self.out, shard_id)

    @property
    def errors_folder(self) -> str:
        """The name of the folder of error rows."""
        return errors_folder(self.job.rules)

    def errors_url(self, shard_id: str) -> str:
        return join(self.out, self.errors_folder, f"{shard_id}.parquet")

    def staging_url(self, shard_id: str) -> str:
        return staging_url(self.out, shard_id)


def _colour_of(hexes: str | None) -> tuple[int, int, int] | None:
    """(red, green, blue) of `#rrggbb`."""
    if hexes is None:
        return None
    return (int(hexes[1:3], 16), int(hexes[3:5], 16), int(hexes[5:7], 16))


@dataclass(frozen=True, slots=True)
class LastSource:
    """The result of the last listing of the source.

    kind: of its shards, None where no run recorded it. left_out: files without a row, by
    left_out.LEFT_OUT. suffixes: those files by suffix.
    """

    kind: ShardKind | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)


def open_dataset(out: str) -> Dataset | None:
    """The dataset in a directory, with the source of its last run; None without one.

    Needs neither torch nor Ray. Raises StorageError for a dataset.json that is not readable, and
    JobError for a pointer: what writes a dataset follows none.
    """
    dataset = find_dataset(out)
    if dataset is None:
        with contextlib.suppress(ObjectRefused):  # rights for what is below `out` are enough
            if (stored := read_pointer(out)) is not None:
                raise JobError(refusal_of(absolute(out), stored.pointer))
    return dataset


def find_dataset(out: str) -> Dataset | None:
    """Like open_dataset, without a look for a pointer."""
    try:
        text = read(dataset_url(out))
    except ObjectMissing:
        return None
    try:
        document = json.loads(text)
        return _from_json(absolute(out), _with_last_source(out, document))
    except (ValueError, KeyError, TypeError, RecursionError, JobError) as error:
        raise StorageError(
            f"{dataset_url(out)} is not readable ({one_line(error)[:160]}). "
            "If another version of vitray wrote it, use that version. "
            "Otherwise restore a copy of it, or move it away and run the same job again: "
            "the run makes a new one and checks it against the data files."
        ) from error


def _with_last_source(out: str, document: dict[str, Any]) -> dict[str, Any]:
    """The document with the source of the last run, where that is readable."""
    source = {name: value for name, value in _read_source(out).items() if name in SOURCE_FIELDS}
    with contextlib.suppress(JobError):
        make_job({"source_rules": 1, **document["job"], **source})
        return {**document, "job": {**document["job"], **source}}
    return document


def restore_dataset(dataset: Dataset) -> None:
    """Write dataset.json again, where another process deleted it meanwhile."""
    if not exists(dataset_url(dataset.out)):
        created = utc_now()
        store_for(dataset.out).create(dataset_url(dataset.out), to_json(dataset, created))


def last_source(out: str) -> LastSource:
    """The result of the last listing in this directory; empty where no run recorded one."""
    document = _read_source(out)
    return LastSource(
        kind=_kind_of(document.get("kind")),
        left_out=_counts(document.get("left_out")),
        suffixes=_counts(document.get("suffixes")),
    )


def _kind_of(value: object) -> ShardKind | None:
    return ShardKind(value) if isinstance(value, str) and value in set(ShardKind) else None


def _counts(value: object) -> dict[str, int]:
    return (
        {str(name): int(count) for name, count in value.items()} if isinstance(value, dict) else {}
    )


def record_source(dataset: Dataset, source: LastSource, always: bool = False) -> None:
    """Write source.json: where this run found its images, which may differ from run to run.

    A limit stays while all runs had one. always: write it even if it is the same, so that its time
    is the start of the run.
    """
    existing = open_dataset(dataset.out)
    if existing is None:
        return
    old, new = _source_fields(existing.job), _source_fields(dataset.job)
    new |= {name: None for name in ("since", "sample", "limit") if old[name] is None}
    document = {**new, **asdict(source)}
    if always or document != {**old, **asdict(last_source(dataset.out))}:
        body = json.dumps(document, indent=1).encode()
        store_for(dataset.out).replace(source_url(dataset.out), body)


def _source_fields(job: Job) -> dict[str, Any]:
    fields = job.model_dump(mode="json")
    return {name: fields[name] for name in SOURCE_FIELDS}


def _read_source(out: str) -> dict[str, Any]:
    """source.json; empty where it is absent or damaged."""
    with contextlib.suppress(StorageError, ValueError, RecursionError):
        document = json.loads(read(source_url(out)))
        if isinstance(document, dict):
            return document
    return {}


def to_json(dataset: Dataset, created: str) -> bytes:
    """The content of dataset.json. created: the current time, in ISO format."""
    document = {
        "fingerprint": dataset.fingerprint,
        "deciding": dataset.fingerprint_fields(),
        "job": dataset.job.model_dump(mode="json"),
        "facts": asdict(dataset.spec),
        "key_is_found": dataset.job.key_is_found,
        "vectors": [asdict(v) for v in dataset.vectors],
        "kept": base64.b64encode(dataset.passthrough.serialize().to_pybytes()).decode(),
        "fragment_rows": dataset.fragment_rows,
        "created": created,
        "versions": package_versions(),
    }
    return json.dumps(document, indent=1).encode()


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of fingerprint fields whose values differ, in the order of `new`."""
    # one of them may come from JSON, which has no tuples
    old, new = json.loads(json.dumps([old, new]))
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
        names = differing(document["deciding"], dataset.fingerprint_fields())
        raise ValueError(f"its fingerprint differs today: {', '.join(sorted(names))}")
    return dataset


def _job_of(document: dict[str, Any]) -> Job:
    """The job of dataset.json; datasets begun before December 2026 have no source rules in it."""
    job = make_job({"source_rules": 1, **document["job"]})
    return job.with_found_key(job.key_column) if document.get("key_is_found") else job


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in dict(fields).items()
    }


def package_versions() -> dict[str, str]:
    """Versions of PACKAGES, and of Python."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES.split():
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions
