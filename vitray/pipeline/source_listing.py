"""The shards that a job's source holds now, given what its dataset knows of earlier runs."""

from __future__ import annotations

import contextlib
import os

from vitray.dataset import (
    NO_GROUP,
    has_ended_without_rows,
    last_source,
    load_group_log,
    open_dataset,
    read_manifest,
    with_source_rules,
)
from vitray.errors import JobError, SourceError, StorageError
from vitray.job import Job
from vitray.schema import ShardKind
from vitray.sources import Group, Listing, kind_of, list_shards
from vitray.storage import absolute, expand_braces, reads


def prepared(job: Job) -> Job:
    """The job as a run takes it: with absolute paths and the source rules of its dataset."""
    return with_source_rules(with_absolute_paths(job))


def with_absolute_paths(job: Job) -> Job:
    """The job with absolute paths, since workers and later commands have other working directories.

    Raises JobError for an `out` that the source would read.
    """
    out = absolute(job.out)
    sources = [absolute(source) for source in job.source]
    for source in sources:
        if any(reads(part, out) for part in expand_braces(source)):
            raise JobError(
                f"`out` {out} lies inside `source` {source}: it would read its own output. Choose "
                f"another `out`."
            )
    paths = {
        "source": sources,
        "allow": [absolute(prefix) for prefix in job.allow],
        "out": out,
        "model": absolute(job.model) if os.path.isdir(job.model) else job.model,
        "head": None if job.head is None else absolute(job.head),
    }
    return job.model_copy(update=paths)


def list_source(job: Job, out: str | None = None) -> Listing:
    """The shards of the job's source now, in the groups and of the kind of its dataset.

    out: the directory of the dataset; the job's own `out` unless it was moved.
    """
    out = out or job.out
    groups = groups_of(out)
    kind = _known_kind(job, out, groups)
    try:
        return list_shards(job, groups, kind)
    except SourceError:
        if kind is None or not has_ended_without_rows(out):
            raise
        return list_shards(job, groups, None)  # a run that committed nothing binds no later one


def groups_of(out: str) -> list[Group]:
    """The groups of loose files in the log of OUT."""
    log = load_group_log(absolute(out))
    last_group, members = {url: number for number, url in log}, dict[int, list[str]]()
    for number, url in log:
        members.setdefault(number, []).append(url)
    members.pop(NO_GROUP, None)
    return [
        Group(number, tuple(url for url in urls if last_group[url] == number), tuple(urls))
        for number, urls in sorted(members.items())
    ]


def _known_kind(job: Job, out: str, groups: list[Group]) -> ShardKind | None:
    """The kind of a dataset's shards: by its last run, else its groups, else its manifest.

    None where the job has another source than the last run.
    """
    dataset = open_dataset(out)
    if dataset is None or dataset.job.source != job.source:
        return None
    if kind := last_source(out).kind:
        return kind
    if groups:
        return ShardKind.FILES
    with contextlib.suppress(StorageError):  # a damaged manifest: its readers report it
        manifest = read_manifest(absolute(out))
        if manifest is not None and len(manifest):
            kind = kind_of(manifest["url"][0].as_py(), job.rules)
            return kind if isinstance(kind, ShardKind) else None
    return None
