"""Which dataset a job goes on with: the one in OUT when its fingerprint is equal, else a new one, else a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from vitray.dataset.identity import Dataset, dataset_url, differing, open_dataset, to_json
from vitray.dataset.ledger import committed, footers_of, require_own
from vitray.errors import FingerprintError, JobError, StorageError
from vitray.job import Job
from vitray.schema import ModelFacts, VectorColumn
from vitray.storage import absolute, exists, join, store_for

COMPACTED = ("_COMPACT.json", "_COMPACTING.json")


def resolve_dataset(job: Job, facts: ModelFacts, vectors: list[VectorColumn], kept: pa.Schema, now: str) -> Dataset:
    """The dataset of this job: made by a conditional create, or the one that is there when its fingerprint is equal.

    `auto` fields adopt what is frozen. Raises FingerprintError with the differing fields,
    also when data files of another one lie there without a dataset.json.
    """
    out = absolute(job.out)
    there = open_dataset(out)
    if there is None:
        rows = job.fragment_rows if job.fragment_rows != "auto" else max(64, facts.batch_size)
        mine = Dataset(out, job, facts, tuple(vectors), kept, rows)
        if marks := [name for name in COMPACTED if exists(join(out, name))]:
            raise JobError(
                f"{out} holds what vitray compact gathered ({marks[0]}): readers would see rows twice. Choose another `out`."
            )
        require_own(mine, footers_of(mine, committed(out)))
        if store_for(out).create(dataset_url(out), to_json(mine, now)):
            return mine
        there = open_dataset(out)
        if there is None:
            raise StorageError(f"{dataset_url(out)} was refused but is not there. Run the same command again.")
    mine = Dataset(out, job, replace(facts, **_frozen(job, there)), tuple(vectors), kept, there.fragment_rows)
    if mine.fingerprint != there.fingerprint:
        raise FingerprintError(_difference(there, mine))
    return mine


def with_frozen(job: Job) -> Job:
    """The job with what `auto` was in the first run, so that engines are timed once; as it is where none was."""
    there = open_dataset(absolute(job.out))
    return job if there is None else job.model_copy(update=_frozen(job, there))


def _frozen(job: Job, there: Dataset) -> dict[str, Any]:
    return {name: getattr(there.facts, name) for name in ("precision", "engine", "batch_size") if getattr(job, name) == "auto"}


def _difference(there: Dataset, mine: Dataset) -> str:
    old, new = there.deciding(), mine.deciding()
    names = differing(old, new)
    for side, facts in ((old, there.facts), (new, mine.facts)):
        side["weights"] = f"{facts.weights_sha256[:8]}… of {facts.model}"
    values = "; ".join(f"{n} differs ({_short(old.get(n))}, this job: {_short(new.get(n))})" for n in names)
    return (
        f"{there.out} belongs to fingerprint {there.fingerprint[:8]}… (this job: {mine.fingerprint[:8]}…): {values}. "
        "Choose another `out` (vitray backfill makes that of another model), or give the job the fields of the first run."
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-32:]}"
