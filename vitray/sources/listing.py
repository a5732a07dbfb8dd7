"""The shards of a job's source: its objects, their kind, and how they are divided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from vitray import storage
from vitray.errors import JobError, ObjectChanged, ObjectMissing, ShardError, SourceError
from vitray.job import Job
from vitray.left_out import LeftOut
from vitray.schema import Shard, ShardKind, SourceRules
from vitray.sources.files import Group, list_files
from vitray.sources.manifest import split_manifest
from vitray.sources.names import (
    COMPRESSED_TAR,
    KINDS,
    WITHOUT_SUFFIX,
    NameKind,
    kind_of,
    suffix_of,
)
from vitray.sources.objects import READERS, whole_shard
from vitray.sources.parquet import split_parquet
from vitray.sources.tables import columns_to_read, parquet_kind, read_schema
from vitray.sources.tar import require_clear_samples
from vitray.sources.text import UnreadableTextError
from vitray.storage import ObjectInfo, PatternObjects

UNREADABLE = (ShardError, ObjectChanged)
FILES_TRIED = 5  # until one can be opened


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds now.

    kind: of its shards; None for an empty listing.
    left_out: number of files that belong to no shard, by left_out.LEFT_OUT. suffixes: number of
    those files by suffix, for messages.
    """

    shards: list[Shard]
    new_groups: list[Group]
    kind: ShardKind | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)


def list_shards(
    job: Job, groups: Sequence[Group], dataset_kind: ShardKind | None = None
) -> Listing:
    """The shards of job.source in its order. Raises SourceError.

    groups: the known groups of loose files.
    dataset_kind: the kind of the dataset that the job continues. Files of other kinds are then left
    out instead of refused.
    """
    matches = _search(job)
    kind = _kind(job, matches.objects, dataset_kind)
    of_kind, unused = _partition(job, kind, matches.objects)
    if not of_kind:
        raise SourceError(
            f"source {_names(job)} holds nothing of format {kind}: "
            f"{_counts(matches.objects, job)}. Correct `source` or `format`."
        )
    new: list[Group] = []
    if kind == ShardKind.FILES:
        shards, new = list_files(of_kind, job, groups)
    else:
        shards = [whole_shard(info, kind) for info in of_kind]
    if kind in (ShardKind.PARQUET, ShardKind.MANIFEST):
        shards = _split(shards, job)
    if kind == ShardKind.TAR and dataset_kind is None:  # a later tar is only set aside itself
        _check_first_readable(shards[:1], lambda shard: require_clear_samples(shard, job))
    left_out = Counter[str](_why_left_out(info, kind, job) for info in unused)
    left_out[LeftOut.HIDDEN] += len(matches.hidden)
    left_out[LeftOut.LINKED_FOLDER] += len(matches.linked_folders)
    suffixes = Counter(suffix_of(info.url, job.rules) for info in unused)
    return Listing(shards, new, kind, dict(+left_out), dict(suffixes))


def _search(job: Job) -> PatternObjects:
    """Every object once, in order."""
    objects = dict[str, ObjectInfo]()
    hidden = set[str]()
    linked = set[str]()
    for pattern in job.source:
        try:
            matches = storage.search(pattern, job.rules)
        except ObjectMissing as error:
            raise SourceError(
                f"source {error}. Correct `source`, or put the images there."
            ) from error
        objects |= {info.url: info for info in matches.objects}
        hidden |= set(matches.hidden)
        linked |= set(matches.linked_folders)
    if not objects:
        raise SourceError(
            f"source {_names(job)} holds no object (names that begin with a dot or an underscore "
            "do not count). Correct `source`."
        )
    return PatternObjects(list(objects.values()), sorted(hidden - objects.keys()), sorted(linked))


def _kind(job: Job, objects: list[ObjectInfo], dataset_kind: ShardKind | None) -> ShardKind:
    if job.format != "auto":
        return ShardKind(job.format)
    return dataset_kind or _detect(job, objects)


def _partition(
    job: Job, kind: ShardKind, objects: list[ObjectInfo]
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """(objects of this kind, all other objects).

    With an explicit `format`, a file that the source names is taken with any suffix. Files
    without a suffix, and files with a suffix that the source spells out, are taken too. The latter
    two do not hold for manifests, because files beside a manifest may be its images.
    """
    kinds: set[NameKind | None] = {kind}
    if kind == ShardKind.MANIFEST:
        kinds.add(ShardKind.PARQUET)
    is_explicit = job.format != "auto"
    named = {storage.absolute(pattern) for pattern in job.source} if is_explicit else set()
    accepted_suffixes = set[str]()
    if is_explicit and job.rules >= SourceRules.V2 and kind != ShardKind.MANIFEST:
        # such as .dat in photos/*.dat
        spelled_out = {suffix_of(pattern, job.rules) for pattern in job.source}
        accepted_suffixes = {WITHOUT_SUFFIX} | (spelled_out - KINDS[job.rules].keys())

    def is_taken(info: ObjectInfo) -> bool:
        is_accepted = suffix_of(info.url, job.rules) in accepted_suffixes
        return kind_of(info.url, job.rules) in kinds or info.url in named or is_accepted

    of_kind = [info for info in objects if is_taken(info)]
    return of_kind, [info for info in objects if not is_taken(info)]


def _why_left_out(info: ObjectInfo, kind: ShardKind, job: Job) -> LeftOut:
    own_kind = kind_of(info.url, job.rules)
    if kind == ShardKind.MANIFEST and own_kind == ShardKind.FILES:
        return LeftOut.BESIDE_MANIFEST
    if own_kind:
        return LeftOut.OTHER_KIND
    if suffix_of(info.url, job.rules) == WITHOUT_SUFFIX:
        return LeftOut.NO_SUFFIX
    return LeftOut.OTHER_SUFFIX


def _detect(job: Job, objects: list[ObjectInfo]) -> ShardKind:
    """The only kind among the suffixes. For Parquet, the columns tell images from a manifest."""
    kinds = {kind for info in objects if (kind := kind_of(info.url, job.rules)) is not None}
    if kinds == {ShardKind.PARQUET}:
        return _detect_in_parquet(job, objects)
    counts = _counts(objects, job)
    if COMPRESSED_TAR in kinds:
        problem = (
            f"holds compressed tars ({counts}), which cannot be streamed exactly. "
            "Unpack them, or leave them out."
        )
    elif len(kinds) == 1:
        return ShardKind(kinds.pop())
    elif kinds:
        problem = (
            f"is a mix: {counts}. Set `format:` to tar, parquet, files or manifest to choose one."
        )
    else:
        problem = (
            f"holds no tar, Parquet, manifest (csv, jsonl) or image: {counts}. "
            "Correct `source`, or set `format:`."
        )
    raise SourceError(f"source {_names(job)} {problem}")


def _detect_in_parquet(job: Job, objects: list[ObjectInfo]) -> ShardKind:
    parquet_files = [info for info in objects if kind_of(info.url, job.rules) == ShardKind.PARQUET]
    for info in parquet_files[:FILES_TRIED]:
        with suppress(*UNREADABLE):
            schema = read_schema(whole_shard(info, ShardKind.PARQUET), job)
            if kind := parquet_kind(schema, job):
                return kind
    return ShardKind.PARQUET


def _split(shards: list[Shard], job: Job) -> list[Shard]:
    """Parts with exact rows. An unreadable shard stays whole with rows=None and fails when read.

    Raises JobError when the first readable shard lacks the columns that the job names, SourceError
    when all shards are text in another encoding.
    """
    with ThreadPoolExecutor(READERS) as pool:
        results = list(pool.map(lambda shard: _parts_of(shard, job), shards))
    unreadable = [result for result in results if isinstance(result, UnreadableTextError)]
    if len(unreadable) == len(results):
        raise SourceError(str(unreadable[0]))
    parts = list[Shard]()
    for shard, result in zip(shards, results):
        parts += [shard] if isinstance(result, UnreadableTextError) else result
    with_rows = [part for part in parts if part.rows]
    _check_first_readable(
        with_rows, lambda part: columns_to_read(read_schema(part, job), part, job)
    )
    return parts


def _check_first_readable(shards: Sequence[Shard], check: Callable[[Shard], object]) -> None:
    """Check shards until one can be read and fits the job. Raises JobError when none fits."""
    first_error: JobError | None = None
    for shard in shards[:FILES_TRIED]:
        try:
            check(shard)
            return
        except UNREADABLE:
            continue
        except JobError as error:  # another file may fit: then only this one is set aside
            first_error = first_error or error
    if first_error:
        raise first_error


def _parts_of(shard: Shard, job: Job) -> list[Shard] | UnreadableTextError:
    try:
        if shard.kind == ShardKind.PARQUET:
            return split_parquet(shard)
        return split_manifest(shard, job)
    except UnreadableTextError as error:
        return error
    except UNREADABLE:
        return [shard]


def _names(job: Job) -> str:
    return ", ".join(job.source[:3]) + (", ..." if len(job.source) > 3 else "")


def _counts(objects: list[ObjectInfo], job: Job) -> str:
    """`12 .jpg, 3 .tar`"""
    suffixes = Counter(suffix_of(info.url, job.rules) for info in objects)
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))
