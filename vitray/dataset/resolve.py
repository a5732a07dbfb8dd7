"""Which dataset a job goes on with: the one in OUT when its fingerprint is equal, else a new one,
else a refusal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.commit import read_footer
from vitray.dataset.files import under
from vitray.dataset.identity import (
    Dataset,
    dataset_url,
    differing,
    open_dataset,
    source_url,
    to_json,
)
from vitray.dataset.ledger import committed, footers_of, require_own
from vitray.errors import FingerprintError, JobError, StorageError
from vitray.job import Job
from vitray.schema import ModelSpec, VectorColumn
from vitray.storage import absolute, exists, join, store_for

COMPACTED = ("_COMPACT.json", "_COMPACTING.json")


def with_source_rules(job: Job) -> Job:
    """The job with the source rules of the dataset in its `out`, the newest ones where there is
    none.

    So too the key column that the first run found, where the job names none. Where dataset.json was
    lost, a data file tells the rules.
    """
    out = absolute(job.out)
    existing = open_dataset(out)
    if existing is None:
        if (
            job.source_rules != "auto"
            or (first := next(iter(sorted(committed(out))), None)) is None
        ):
            return job.model_copy(update={"source_rules": job.rules})
        footer = read_footer(join(out, "data", f"{first}.parquet"))
        job = job.model_copy(update={"source_rules": footer.source_rules})
        return job if job.key_column else job.with_found_key(footer.key_column)
    rules = existing.job.rules if job.source_rules == "auto" else job.rules
    job = job.model_copy(update={"source_rules": rules})
    return (
        job.with_found_key(existing.job.key_column)
        if existing.job.key_is_found and job.key_column is None
        else job
    )


def resolve_dataset(
    job: Job, spec: ModelSpec, vectors: list[VectorColumn], passthrough: pa.Schema, now: str
) -> Dataset:
    """The dataset of this job: made by a conditional create, or the one that is there when its
    fingerprint is equal.

    `auto` fields adopt what is frozen. Raises FingerprintError with the differing fields,
    also when data files of another one lie there without a dataset.json.
    """
    out = absolute(job.out)
    there = open_dataset(out)
    if there is None:
        rows = job.fragment_rows if job.fragment_rows != "auto" else max(64, spec.batch_size)
        mine = Dataset(out, job, spec, tuple(vectors), passthrough, rows)
        if metadata := [name for name in COMPACTED if exists(join(out, name))]:
            raise JobError(
                f"{out} holds what vitray compact gathered ({metadata[0]}): readers would see "
                f"rows twice. Choose another `out`."
            )
        require_own(mine, footers_of(mine, committed(out)))
        if store_for(out).create(dataset_url(out), to_json(mine, now)):
            return replace(mine, is_new=True)
        there = open_dataset(out)
        if there is None:
            raise StorageError(
                f"{dataset_url(out)} was refused but is not there. Run the same command again."
            )
    mine = Dataset(
        out,
        job,
        replace(spec, **_frozen(job, there)),
        tuple(vectors),
        passthrough,
        there.fragment_rows,
    )
    if mine.fingerprint == there.fingerprint:
        return mine
    if _has_ended_without_rows(out):
        drop_unstarted(out)
        return resolve_dataset(job, spec, vectors, passthrough, now)
    raise FingerprintError(_difference(there, mine))


def passthrough_in_data(out: str, names: Sequence[str]) -> pa.Schema | None:
    """The types of passthrough columns in a data file of a directory; None where there is none, or
    it lacks one of them.
    """
    for shard in sorted(committed(absolute(out))):
        with store_for(out).open(join(absolute(out), "data", f"{shard}.parquet")) as stream:
            schema = pq.read_schema(stream).remove_metadata()
        return (
            pa.schema([schema.field(name) for name in names])
            if set(names) <= set(schema.names)
            else None
        )
    return None


def drop_unstarted(out: str) -> bool:
    """Forget a dataset that has no data file, with its groups and fragments, so that any job may
    begin one here.

    Returns whether it did.
    """
    if committed(absolute(out)):
        return False
    left = [info.url for folder in ("shards", "staging") for info in under(out, "_vitray", folder)]
    store_for(out).delete([dataset_url(out), source_url(out), *left])
    return True


def _has_ended_without_rows(out: str) -> bool:
    """Whether no shard is committed and the last run has ended: its record is newer than the
    beginning of any run.

    source.json is written by each run that begins.
    """

    def times(*place: str) -> list[float]:
        return [info.modified or 0.0 for info in under(out, "_vitray", *place)]

    records = times("runs")
    others = [*times("staging"), *times("dataset.json"), *times("source.json")]
    return not committed(out) and bool(records) and max(records) >= max(others, default=0.0)


def with_frozen(job: Job) -> Job:
    """The job with what `auto` was in the first run, so that engines are timed once; as it is where
    none was.
    """
    there = open_dataset(absolute(job.out))
    return job if there is None else job.model_copy(update=_frozen(job, there))


def _frozen(job: Job, there: Dataset) -> dict[str, Any]:
    return {
        name: getattr(there.spec, name)
        for name in ("precision", "engine", "batch_size")
        if getattr(job, name) == "auto"
    }


def _difference(there: Dataset, mine: Dataset) -> str:
    old, new = there.deciding(), mine.deciding()
    names = differing(old, new)
    for side, spec in ((old, there.spec), (new, mine.spec)):
        side["weights"] = f"{spec.weights_sha256[:8]}… of {spec.model}"
    values = "; ".join(
        f"{n} differs ({_short(old.get(n))}, this job: {_short(new.get(n))})" for n in names
    )
    if not committed(there.out):
        step = (
            f"Choose another `out`. If no run works on this one, delete {there.out}/_vitray to "
            f"begin anew: it has no rows yet."
        )
    else:
        step = (
            "Choose another `out` (vitray backfill makes that of another model), or give the job "
            "the fields of the first run."
        )
    return (
        f"{there.out} belongs to fingerprint {there.fingerprint[:8]}… (this job: "
        f"{mine.fingerprint[:8]}…): {values}. {step}"
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-32:]}"
