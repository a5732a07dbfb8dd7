"""From a job's source to its shards: what is there, what kind it is, how it is cut. Private to this
package.
"""

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
from vitray.schema import Shard
from vitray.sources.files import Group, list_files
from vitray.sources.manifest import split_manifest
from vitray.sources.names import COMPRESSED_TAR, KINDS, WITHOUT_SUFFIX, kind_of, suffix_of
from vitray.sources.objects import READERS, whole_shard
from vitray.sources.parquet import split_parquet
from vitray.sources.tables import columns_to_read, parquet_kind, read_schema
from vitray.sources.tar import require_clear_samples
from vitray.sources.text import UnreadableTextError
from vitray.storage import Found, ObjectInfo

UNREADABLE = (ShardError, ObjectChanged)
LOOK_INTO = 5  # files tried until one can be opened


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds now. left_out: files that belong to no shard, by left_out.LEFT_OUT.

    suffixes: how many of them have which suffix, for people.
    """

    shards: list[Shard]
    new_groups: list[Group]
    kind: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    suffixes: dict[str, int] = field(default_factory=dict)


def list_shards(job: Job, groups: Sequence[Group], known_kind: str | None = None) -> Listing:
    """The shards of job.source in its order. Raises SourceError.

    groups: known membership of loose files. known_kind: the kind of the dataset that the job goes
    on with; where the source holds such files, files of other kinds are left out instead of
    refused.
    """
    found = _search(job)
    kind = _kind(job, found.objects, known_kind)
    chosen, others = _choose(job, kind, found.objects)
    if not chosen:
        raise SourceError(
            f"source {_names(job)} holds nothing of format {kind}: {_counts(found.objects, job)}. "
            f"Correct `source` or `format`."
        )
    new: list[Group] = []
    if kind == "files":
        shards, new = list_files(chosen, job, groups)
    else:
        shards = [whole_shard(info, kind) for info in chosen]
    if kind in ("parquet", "manifest"):
        shards = _split(shards, job)
    if kind == "tar" and known_kind is None:  # a later tar is set aside alone
        _of_first_readable(shards[:1], lambda shard: require_clear_samples(shard, job))
    left_out = Counter[str](_why_left_out(info, kind, job) for info in others)
    left_out.update(
        {LeftOut.HIDDEN: len(found.hidden), LeftOut.LINKED_FOLDER: len(found.linked_folders)}
    )
    suffixes = Counter(suffix_of(info.url, job.rules) for info in others)
    return Listing(shards, new, kind, dict(+left_out), dict(suffixes))


def _search(job: Job) -> Found:
    """Every object once, in order."""
    objects, hidden, linked = dict[str, ObjectInfo](), set[str](), set[str]()
    for pattern in job.source:
        try:
            found = storage.search(pattern, job.rules)
        except ObjectMissing as error:
            raise SourceError(
                f"source {error}. Correct `source`, or put the images there."
            ) from error
        objects |= {info.url: info for info in found.objects}
        hidden |= set(found.hidden)
        linked |= set(found.linked_folders)
    if not objects:
        raise SourceError(
            f"source {_names(job)} holds no object (names that begin with a dot or an underscore "
            f"do not count). Correct `source`."
        )
    return Found(list(objects.values()), sorted(hidden - objects.keys()), sorted(linked))


def _kind(job: Job, found: list[ObjectInfo], known_kind: str | None) -> str:
    if job.format != "auto":
        return job.format
    return known_kind or _detect(job, found)


def _choose(
    job: Job, kind: str, found: list[ObjectInfo]
) -> tuple[list[ObjectInfo], list[ObjectInfo]]:
    """Objects of this kind, and the others.

    With an explicit format, names in the source are taken whatever their suffix. So are files
    without a suffix, or with one that the source spells out, unless beside a manifest: they may be
    its images.
    """
    kinds: set[str | None] = {kind, "parquet"} if kind == "manifest" else {kind}
    is_explicit = job.format != "auto"
    named = {storage.absolute(pattern) for pattern in job.source} if is_explicit else set()
    bare = set[str]()
    if is_explicit and job.rules > 1 and kind != "manifest":
        asked = {
            suffix_of(pattern, job.rules) for pattern in job.source
        }  # such as .dat in photos/*.dat
        bare = {WITHOUT_SUFFIX, *(suffix for suffix in asked if suffix not in KINDS[job.rules])}

    def is_taken(info: ObjectInfo) -> bool:
        is_bare = suffix_of(info.url, job.rules) in bare
        return kind_of(info.url, job.rules) in kinds or info.url in named or is_bare

    chosen = [info for info in found if is_taken(info)]
    return chosen, [info for info in found if not is_taken(info)]


def _why_left_out(info: ObjectInfo, kind: str, job: Job) -> LeftOut:
    own_kind = kind_of(info.url, job.rules)
    if kind == "manifest" and own_kind == "files":
        return LeftOut.BESIDE_MANIFEST
    if own_kind:
        return LeftOut.OTHER_KIND
    return (
        LeftOut.NO_SUFFIX
        if suffix_of(info.url, job.rules) == WITHOUT_SUFFIX
        else LeftOut.OTHER_SUFFIX
    )


def _detect(job: Job, found: list[ObjectInfo]) -> str:
    """The one kind that the suffixes tell; for Parquet, the columns decide between images and a
    manifest.
    """
    kinds = {kind for info in found if (kind := kind_of(info.url, job.rules)) is not None}
    if kinds == {"parquet"}:
        return _detect_in_parquet(job, found)
    if COMPRESSED_TAR in kinds:
        what = (
            f"holds compressed tars ({_counts(found, job)}), which cannot be streamed exactly. "
            f"Unpack them, or leave them out."
        )
    elif len(kinds) == 1:
        return kinds.pop()
    elif kinds:
        what = (
            f"is a mix: {_counts(found, job)}. Set `format:` to tar, parquet, files or manifest to "
            f"choose one."
        )
    else:
        what = (
            f"holds no tar, Parquet, manifest (csv, jsonl) or image: {_counts(found, job)}. "
            f"Correct `source`, or set `format:`."
        )
    raise SourceError(f"source {_names(job)} {what}")


def _detect_in_parquet(job: Job, found: list[ObjectInfo]) -> str:
    for info in [info for info in found if kind_of(info.url, job.rules) == "parquet"][:LOOK_INTO]:
        with suppress(*UNREADABLE):
            if kind := parquet_kind(read_schema(whole_shard(info, "parquet"), job), job):
                return kind
    return "parquet"


def _split(shards: list[Shard], job: Job) -> list[Shard]:
    """Parts with exact rows; what cannot be read stays whole with rows=None, and fails when it is
    read.

    Raises JobError when the first that can be read has not the columns that the job names,
    SourceError when all are text in another encoding.
    """
    with ThreadPoolExecutor(READERS) as pool:
        split = list(pool.map(lambda whole: _parts_of(whole, job), shards))
    unreadable = [error for error in split if isinstance(error, UnreadableTextError)]
    if len(unreadable) == len(split):
        raise SourceError(str(unreadable[0]))
    parts = list[Shard]()
    for whole, its_parts in zip(shards, split):
        parts += [whole] if isinstance(its_parts, UnreadableTextError) else its_parts
    with_rows = [part for part in parts if part.rows]
    _of_first_readable(with_rows, lambda part: columns_to_read(read_schema(part, job), part, job))
    return parts


def _of_first_readable(shards: Sequence[Shard], look: Callable[[Shard], object]) -> None:
    """Look into shards until one can be read and fits the job. Raises JobError when none fits."""
    first_error: JobError | None = None
    for shard in shards[:LOOK_INTO]:
        try:
            look(shard)
            return
        except UNREADABLE:
            continue
        except JobError as error:  # another file may have the column: this one is set aside then
            first_error = first_error or error
    if first_error:
        raise first_error


def _parts_of(whole: Shard, job: Job) -> list[Shard] | UnreadableTextError:
    try:
        return split_parquet(whole) if whole.kind == "parquet" else split_manifest(whole, job)
    except UnreadableTextError as error:
        return error
    except UNREADABLE:
        return [whole]


def _names(job: Job) -> str:
    return ", ".join(job.source[:3]) + (", ..." if len(job.source) > 3 else "")


def _counts(found: list[ObjectInfo], job: Job) -> str:
    """`12 .jpg, 3 .tar`"""
    suffixes = Counter(suffix_of(info.url, job.rules) for info in found)
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))
