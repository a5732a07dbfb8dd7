"""Which dataset a job goes on with: the one in OUT when its fingerprint is equal, else a new one, else a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from vitray.dataset.commit import read_footer
from vitray.dataset.files import under
from vitray.dataset.identity import Dataset, dataset_url, differing, open_dataset, source_url, to_json
from vitray.dataset.ledger import committed, footers_of, require_own
from vitray.errors import FingerprintError, JobError, StorageError
from vitray.job import Job
from vitray.schema import ModelFacts, VectorColumn
from vitray.storage import absolute, exists, join, store_for

COMPACTED = ("_COMPACT.json", "_COMPACTING.json")


def with_source_rules(job: Job) -> Job:
    """The job with the source rules of the dataset in its `out`, the newest ones where there is none.

    So too the key column that the first run found, where the job names none. Where dataset.json was
    lost, a data file tells the rules.
    """
    out = absolute(job.out)
    existing = open_dataset(out)
    if existing is None:
        first = next(iter(sorted(committed(out))), None) if job.source_rules == "auto" else None
        rules = read_footer(join(out, "data", f"{first}.parquet")).source_rules if first else job.rules
        return job.model_copy(update={"source_rules": rules})
    rules = existing.job.rules if job.source_rules == "auto" else job.rules
    found = {"key_column": existing.job.key_column} if rules > 1 and job.key_column is None else {}
    return job.model_copy(update={"source_rules": rules, **found})


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
            return replace(mine, is_new=True)
        there = open_dataset(out)
        if there is None:
            raise StorageError(f"{dataset_url(out)} was refused but is not there. Run the same command again.")
    mine = Dataset(out, job, replace(facts, **_frozen(job, there)), tuple(vectors), kept, there.fragment_rows)
    if mine.fingerprint == there.fingerprint:
        return mine
    if _has_ended_without_rows(out):
        drop_unstarted(out)
        return resolve_dataset(job, facts, vectors, kept, now)
    raise FingerprintError(_difference(there, mine))


def drop_unstarted(out: str) -> bool:
    """Forget a dataset that has no data file, so that any job may begin one here. Returns whether it did.

    Fragments stay: the next run uses those of its own fingerprint and deletes the others.
    """
    if committed(absolute(out)):
        return False
    store_for(out).delete([dataset_url(out), source_url(out)])
    return True


def _has_ended_without_rows(out: str) -> bool:
    """Whether no shard is committed and the last run has ended: its record is newer than the beginning of any run.

    source.json is written by each run that begins.
    """

    def times(*place: str) -> list[float]:
        return [info.modified or 0.0 for info in under(out, "_vitray", *place)]

    records = times("runs")
    others = [*times("staging"), *times("dataset.json"), *times("source.json")]
    return not committed(out) and bool(records) and max(records) >= max(others, default=0.0)


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
    if not committed(there.out):
        step = f"Choose another `out`, or delete {dataset_url(there.out)} to begin anew: no shard is committed there yet."
    else:
        step = "Choose another `out` (vitray backfill makes that of another model), or give the job the fields of the first run."
    return f"{there.out} belongs to fingerprint {there.fingerprint[:8]}… (this job: {mine.fingerprint[:8]}…): {values}. {step}"


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-32:]}"
