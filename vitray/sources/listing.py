"""From a job's source to its shards: what is there, what kind it is, how it is cut. Private to this room."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from vitray import storage
from vitray.errors import ObjectChanged, ObjectMissing, ShardError, SourceError
from vitray.job import Job
from vitray.schema import IMAGE_EXTENSIONS, Shard
from vitray.sources.files import Group, list_files
from vitray.sources.manifest import split_manifest
from vitray.sources.objects import READERS, whole_shard
from vitray.sources.parquet import split_parquet
from vitray.sources.tables import columns_to_read, likely_columns, read_schema
from vitray.storage import ObjectInfo

KINDS = {
    ".tar": "tar",
    ".parquet": "parquet",
    **dict.fromkeys((".csv", ".jsonl", ".ndjson"), "manifest"),
    **{f".{extension}": "files" for extension in IMAGE_EXTENSIONS},
    **dict.fromkeys((".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"), "compressed tar"),
}
SUFFIX = re.compile(r"\.tar\.(gz|bz2|xz|zst)$|\.[^./]*$")
UNREADABLE = (ShardError, ObjectChanged)
LOOK_INTO = 5  # Parquet files tried until one can be opened


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds now."""

    shards: list[Shard]
    new_groups: list[Group]


def list_shards(job: Job, groups: Sequence[Group]) -> Listing:
    """The shards of job.source in its order. `groups`: known membership of loose files. Raises SourceError."""
    found = _expand(job)
    kind = _detect(job, found) if job.format == "auto" else job.format
    kinds = {kind, "parquet"} if kind == "manifest" else {kind}
    named = {storage.absolute(pattern) for pattern in job.source} if job.format != "auto" else set()
    chosen = [info for info in found if _kind_of(info) in kinds or info.url in named]
    if not chosen:
        raise SourceError(f"source {_names(job)} holds nothing of format {kind}: {_counts(found)}. Correct `source` or `format`.")
    new: list[Group] = []
    if kind == "files":
        shards, new = list_files(chosen, job, groups)
    else:
        shards = [whole_shard(info, kind) for info in chosen]
    if kind in ("parquet", "manifest"):
        shards = _split(shards, job)
    return Listing(shards, new)


def _expand(job: Job) -> list[ObjectInfo]:
    """Every object once, in order."""
    found: dict[str, ObjectInfo] = {}
    for pattern in job.source:
        try:
            found |= {info.url: info for info in storage.expand(pattern)}
        except ObjectMissing as error:
            raise SourceError(f"source {error}. Correct `source`, or put the images there.") from error
    if not found:
        raise SourceError(f"source {_names(job)} holds no object (hidden ones do not count). Correct `source`.")
    return list(found.values())


def _detect(job: Job, found: list[ObjectInfo]) -> str:
    """The one kind that the suffixes tell; for Parquet, the columns decide between images and a manifest."""
    kinds = {kind for kind in map(_kind_of, found) if kind is not None}
    if kinds == {"parquet"}:
        return _parquet_kind(job, found)
    if "compressed tar" in kinds:
        what = f"holds compressed tars ({_counts(found)}), which cannot be streamed exactly. Unpack them, or leave them out."
    elif len(kinds) == 1:
        return kinds.pop()
    elif kinds:
        what = f"is a mix: {_counts(found)}. Set `format:` to tar, parquet, files or manifest to choose one."
    else:
        what = f"holds no tar, Parquet, manifest (csv, jsonl) or image: {_counts(found)}. Correct `source`, or set `format:`."
    raise SourceError(f"source {_names(job)} {what}")


def _parquet_kind(job: Job, found: list[ObjectInfo]) -> str:
    for info in [info for info in found if _kind_of(info) == "parquet"][:LOOK_INTO]:
        with suppress(*UNREADABLE):
            schema = read_schema(whole_shard(info, "parquet"))
            for kind in ("parquet", "manifest"):
                if likely_columns(schema, kind, job):
                    return kind
    return "parquet"


def _split(shards: list[Shard], job: Job) -> list[Shard]:
    """Parts with exact rows; what cannot be read stays whole with rows=None, and fails when it is read.

    Raises JobError when the first that can be read has not the columns that the job names.
    """
    with ThreadPoolExecutor(READERS) as pool:
        parts = [part for parts in pool.map(lambda whole: _parts_of(whole, job), shards) for part in parts]
    for part in parts:
        with suppress(*UNREADABLE):
            if part.rows:
                columns_to_read(read_schema(part), part.kind, job)
                break
    return parts


def _parts_of(whole: Shard, job: Job) -> list[Shard]:
    try:
        return split_parquet(whole) if whole.kind == "parquet" else split_manifest(whole, job)
    except UNREADABLE:
        return [whole]


def _kind_of(info: ObjectInfo) -> str | None:
    return KINDS.get(_suffix(info))


def _suffix(info: ObjectInfo) -> str:
    match = SUFFIX.search(info.url.lower())
    return match[0] if match else "without suffix"


def _names(job: Job) -> str:
    return ", ".join(job.source[:3]) + (", ..." if len(job.source) > 3 else "")


def _counts(found: list[ObjectInfo]) -> str:
    """`12 .jpg, 3 .tar`"""
    return ", ".join(f"{count} {suffix}" for suffix, count in Counter(map(_suffix, found)).most_common(8))
