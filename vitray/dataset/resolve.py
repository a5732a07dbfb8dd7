"""The dataset that a job continues: the one in OUT if fingerprints are equal, else a new one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.files import under
from vitray.dataset.footer import read_footer
from vitray.dataset.identity import Dataset, differing, open_dataset, to_json
from vitray.dataset.layout import (
    COMPACTED,
    data_url,
    dataset_url,
    group_log_url,
    internal_url,
    runs_url,
    source_url,
    staging_url,
)
from vitray.dataset.ledger import (
    committed_files,
    footers_of,
    require_own,
    require_own_data_files,
)
from vitray.errors import FingerprintError, JobError, StorageError
from vitray.job import Job
from vitray.schema import ModelSpec, VectorColumn
from vitray.storage import absolute, exists, join, store_for

# of the pixels of an `auto` fragment: 1,024 images of 224 pixels are 154 MB. Each decoder process
# keeps two fragments in memory; 1,024 images of 518 pixels would be 824 MB each.
FRAGMENT_BYTES = 160_000_000
LEAST_FRAGMENT_ROWS = 64
FROZEN_FIELDS = ("precision", "engine", "batch_size")  # `auto` in a job means: as in the first run


def with_source_rules(job: Job) -> Job:
    """The job with the source rules of the dataset in its `out`; the newest rules for a new one.

    The job also gets the key column that the first run found, where it names none. Where
    dataset.json was lost, the footer of a data file has both.
    """
    existing = open_dataset(absolute(job.out))
    if existing is None:
        return _with_rules_of_data(job)
    rules = existing.job.rules if job.source_rules == "auto" else job.rules
    job = job.model_copy(update={"source_rules": int(rules)})
    if existing.job.key_is_found and job.key_column is None:
        return job.with_found_key(existing.job.key_column)
    return job


def _with_rules_of_data(job: Job) -> Job:
    """The job with the rules and key column in the footer of a data file, where there is one."""
    out = absolute(job.out)
    shards = sorted(committed_files(out)) if job.source_rules == "auto" else []
    if not shards:
        return job.model_copy(update={"source_rules": int(job.rules)})
    footer = read_footer(data_url(out, shards[0]))
    job = job.model_copy(update={"source_rules": footer.source_rules})
    return job if job.key_column else job.with_found_key(footer.key_column)


def auto_fragment_rows(spec: ModelSpec) -> int:
    """Images in a fragment: 1,024 on a GPU (4 batches of 256), 64 on a CPU.

    Fewer for large images, whose pixels would take more than FRAGMENT_BYTES.

    A fragment costs its worker about 1 ms of Python and a request to the store. It is also what a
    crash loses.
    """
    height, width = spec.pixels.shape
    images_in_memory = FRAGMENT_BYTES // (height * width * 3)
    return max(LEAST_FRAGMENT_ROWS, min(4 * spec.batch_size, images_in_memory))


def resolve_dataset(
    job: Job, spec: ModelSpec, vectors: list[VectorColumn], passthrough: pa.Schema, created: str
) -> Dataset:
    """The dataset of this job: a new one, or the existing one when its fingerprint is equal.

    `auto` fields take the frozen values. created: the current time, in ISO format.

    Raises FingerprintError with the differing fields, also for data files of another dataset
    without a dataset.json.
    """
    out = absolute(job.out)
    existing = open_dataset(out)
    if existing is None:
        rows = auto_fragment_rows(spec) if job.fragment_rows == "auto" else job.fragment_rows
        new = Dataset(out, job, spec, tuple(vectors), passthrough, rows)
        _require_unused(new)
        if store_for(out).create(dataset_url(out), to_json(new, created)):
            return replace(new, is_new=True)
        existing = open_dataset(out)
        if existing is None:
            raise StorageError(
                f"the store refused to create {dataset_url(out)}, which does not exist. "
                "Run the same command again."
            )
    requested = _requested(job, existing, spec, vectors, passthrough)
    if requested.fingerprint == existing.fingerprint:
        return requested
    if has_ended_without_rows(out):
        drop_unstarted(out)
        return resolve_dataset(job, spec, vectors, passthrough, created)
    raise FingerprintError(_difference(existing, requested))


def require_continuable(
    job: Job,
    specs: Sequence[ModelSpec],
    vectors: Sequence[VectorColumn],
    passthrough: pa.Schema,
    most_footers: int | None = None,
) -> None:
    """Raise what `resolve_dataset` and require_own_data_files() would raise. Writes nothing.

    specs: what the model may be, if `auto` values of the job are not chosen yet.
    most_footers: of data files, to read at most.
    """
    out = absolute(job.out)
    existing = open_dataset(out)
    if existing is None:
        _require_not_compacted(out)
        data = sorted(committed_files(out))[:most_footers]
        datasets = [Dataset(out, job, spec, tuple(vectors), passthrough, 1) for spec in specs]
        footers = footers_of(datasets[0], data)
        found = {footer.fingerprint for footer in footers.values()}
        likely = next((d for d in datasets if d.fingerprint in found), datasets[0])
        require_own(likely, footers)
        return
    requested = _requested(job, existing, specs[0], vectors, passthrough)
    if requested.fingerprint == existing.fingerprint:
        require_own_data_files(existing, most_footers)
    elif not has_ended_without_rows(out):
        raise FingerprintError(_difference(existing, requested))


def _requested(
    job: Job,
    existing: Dataset,
    spec: ModelSpec,
    vectors: Sequence[VectorColumn],
    passthrough: pa.Schema,
) -> Dataset:
    """What the job asks for, with the frozen values of the existing dataset in place of `auto`."""
    spec_of_run = replace(spec, **_frozen(job, existing))
    return Dataset(
        existing.out, job, spec_of_run, tuple(vectors), passthrough, existing.fragment_rows
    )


def _require_unused(dataset: Dataset) -> None:
    """Raises JobError or FingerprintError for a directory with files of another origin."""
    _require_not_compacted(dataset.out)
    require_own(dataset, footers_of(dataset, committed_files(dataset.out)))


def _require_not_compacted(out: str) -> None:
    for name in COMPACTED:
        if exists(join(out, name)):
            raise JobError(
                f"{out} holds the output of vitray compact ({name}): readers would see rows twice. "
                "Choose another `out`."
            )


def passthrough_in_data(out: str, names: Sequence[str]) -> pa.Schema | None:
    """The types of passthrough columns in a data file of a directory.

    None where there is no data file, or it lacks one of the columns.
    """
    shards = sorted(committed_files(absolute(out)))
    if not shards:
        return None
    with store_for(out).open(data_url(out, shards[0])) as stream:
        schema = pq.read_schema(stream).remove_metadata()
    if not set(names) <= set(schema.names):
        return None
    return pa.schema([schema.field(name) for name in names])


def drop_unstarted(out: str) -> bool:
    """Delete a dataset that has no data file, with its groups and fragments.

    Any job may begin a new one then. Returns whether it was deleted.
    """
    if committed_files(absolute(out)):
        return False
    infos = [*under(group_log_url(out)), *under(staging_url(out))]
    urls = [dataset_url(out), source_url(out), *(info.url for info in infos)]
    store_for(out).delete(urls)
    return True


def has_ended_without_rows(out: str) -> bool:
    """Whether no shard is committed and the last run has ended.

    It has ended when its record is newer than the start of any run: each run that begins writes
    source.json.
    """

    def latest(url: str) -> float | None:
        return max((info.modified or 0.0 for info in under(url)), default=None)

    ended = latest(runs_url(out))
    if ended is None or committed_files(out):
        return False
    starts = (latest(staging_url(out)), latest(dataset_url(out)), latest(source_url(out)))
    return ended >= max((start for start in starts if start is not None), default=0.0)


def with_frozen(job: Job) -> Job:
    """The job with the first run's values in place of `auto`, so that engines are timed once.

    A job without a dataset stays as it is.
    """
    existing = open_dataset(absolute(job.out))
    return job if existing is None else job.model_copy(update=_frozen(job, existing))


def _frozen(job: Job, existing: Dataset) -> dict[str, Any]:
    """The frozen values of the fields that are `auto` in the job."""
    return {
        name: getattr(existing.spec, name) for name in FROZEN_FIELDS if getattr(job, name) == "auto"
    }


def _difference(existing: Dataset, requested: Dataset) -> str:
    """The message of a FingerprintError: which fields differ, and what to do next."""
    old, new = existing.fingerprint_fields(), requested.fingerprint_fields()
    names = differing(old, new)
    for fields, spec in ((old, existing.spec), (new, requested.spec)):
        fields["weights"] = f"{spec.weights_sha256[:8]}… of {spec.model}"
    values = "; ".join(
        f"{n} differs ({_short(old.get(n))}, this job: {_short(new.get(n))})" for n in names
    )
    if committed_files(existing.out):
        step = (
            "Choose another `out` (vitray backfill fills one for another model), or give the job "
            "the fields of the first run."
        )
    else:
        step = (
            "Choose another `out`. If no run works on this one, "
            f"delete {internal_url(existing.out)} to start over: it has no rows yet."
        )
    return (
        f"{existing.out} belongs to fingerprint {existing.fingerprint[:8]}… (this job: "
        f"{requested.fingerprint[:8]}…): {values}. {step}"
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}…{text[-32:]}"
