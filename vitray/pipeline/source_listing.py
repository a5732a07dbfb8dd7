"""The shards that a job's source holds now, given what its dataset knows of earlier runs."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import pyarrow as pa

from vitray.dataset import (
    NO_GROUP,
    accepted_ids,
    append_group_log,
    committed_files,
    count_rows,
    has_ended_without_rows,
    last_source,
    load_group_log,
    open_dataset,
    passthrough_in_data,
    read_manifest,
    reconcile,
    with_source_rules,
)
from vitray.errors import JobError, SourceError, StorageError
from vitray.job import Job
from vitray.schema import Shard, ShardKind
from vitray.sources import (
    Group,
    Listing,
    kind_of,
    list_shards,
    passthrough_schema,
    select_shards,
)
from vitray.storage import absolute, expand_braces, reads

SETTLE_ATTEMPTS = 20


def prepare_job(job: Job) -> Job:
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
                f"`out` {out} lies inside `source` {source}: it would read its own output. "
                "Choose another `out`."
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
    kind = _dataset_kind(job, out, groups)
    try:
        return list_shards(job, groups, kind)
    except SourceError:
        if kind is None or not has_ended_without_rows(out):
            raise
        # A run that committed nothing does not decide the kind of later ones.
        return list_shards(job, groups, None)


def groups_of(out: str) -> list[Group]:
    """The groups of loose files in the log of OUT."""
    log = load_group_log(absolute(out))
    last_group = {url: number for number, url in log}
    members = dict[int, list[str]]()
    for number, url in log:
        members.setdefault(number, []).append(url)
    members.pop(NO_GROUP, None)
    return [
        Group(number, tuple(url for url in urls if last_group[url] == number), tuple(urls))
        for number, urls in sorted(members.items())
    ]


def settle_groups(job: Job, listing: Listing, prune: bool, agreed: Gone | None = None) -> Listing:
    """The listing with all its groups in the log, written by this run or by a faster one.

    prune, agreed: remove deleted files from their groups, all of them or only those.
    """
    for _ in range(SETTLE_ATTEMPTS):
        deleted = list[tuple[int, str]]()
        if prune:
            deleted = [(NO_GROUP, url) for url in files_to_prune(listing, agreed)]
        new = [(group.number, url) for group in listing.new_groups for url in group.urls]
        entries = deleted or new
        # After new groups the source is not listed again: files that arrive in the meantime would
        # become groups of one or two.
        if not entries or (append_group_log(absolute(job.out), entries) and not deleted):
            return listing
        listing = list_source(job)
    raise StorageError(
        f"{job.out}: other runs keep appending groups. Wait for them, then run the same command "
        "again."
    )


def deleted_files(shard: Shard) -> list[str]:
    """Files of a group that no longer exist. Each is an error row until it is pruned."""
    return [member.url for member in shard.members if member.size < 0 and not member.version]


def files_to_prune(listing: Listing, agreed: Gone | None) -> list[str]:
    """The deleted files of all groups. agreed: only those among its files; None for all."""
    files = [url for shard in listing.shards for url in deleted_files(shard)]
    return files if agreed is None else [url for url in files if url in set(agreed.files)]


def passthrough_of(job: Job, listing: Listing) -> pa.Schema:
    """The types of the passthrough columns: those of the dataset, else those of the first files.

    Raises ShardError when no file can be read.
    """
    stored = stored_passthrough(job)
    return passthrough_schema(listing.shards, job) if stored is None else stored


def stored_passthrough(job: Job) -> pa.Schema | None:
    """The types of the passthrough columns in the dataset, if it has those of the job."""
    existing = open_dataset(job.out)
    if existing is None:  # not there yet, or dataset.json was lost
        return passthrough_in_data(job.out, [job.passthrough_name(name) for name in job.keep])
    return existing.passthrough if existing.job.keep == job.keep else None


def pending_shards(job: Job, listing: Listing) -> list[Shard]:
    """The selected shards that are neither committed nor accepted as they are."""
    out = absolute(job.out)
    done = committed_files(out).keys() | accepted_ids(out)
    return [shard for shard in select_shards(listing.shards, job) if shard.id not in done]


def _dataset_kind(job: Job, out: str, groups: list[Group]) -> ShardKind | None:
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
            by_suffix = kind_of(manifest["url"][0].as_py(), job.rules)
            return by_suffix if isinstance(by_suffix, ShardKind) else None
    return None


@dataclass(frozen=True, slots=True)
class Gone:
    """What `prune` removes from a dataset.

    shards: {data file whose input is gone: its images}. files: of groups that continue without
    them.
    """

    shards: dict[str, int]
    files: list[str]

    @property
    def images(self) -> int:
        return sum(self.shards.values()) + len(self.files)


def find_gone(job: Job) -> Gone:
    """What a run with `prune` would remove now; nothing where there is no dataset yet."""
    job = prepare_job(job)
    dataset = open_dataset(job.out)
    if dataset is None:
        return Gone({}, [])
    listing = list_source(job)
    committed = committed_files(job.out).keys()
    listed = [shard.id for shard in listing.shards]
    actions = reconcile(listed, listed, committed, committed, prune=True)
    files = files_to_prune(listing, None)
    return Gone(count_rows(dataset, actions.pruned), files)
