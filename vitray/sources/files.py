"""Loose image files, in groups whose membership never changes."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from vitray.errors import JobError
from vitray.job import Job
from vitray.schema import (
    CAMERA_RAW_SUFFIXES,
    Encoded,
    End,
    Member,
    Reason,
    Shard,
    ShardKind,
    SourceRules,
    short_hash,
)
from vitray.sources.names import is_folder_column
from vitray.sources.objects import MAX_IMAGE_BYTES, read_in_order, shard_id, too_large
from vitray.sources.tables import with_folder_columns
from vitray.storage import ObjectInfo


@dataclass(frozen=True, slots=True)
class Group:
    """The members of one group of loose files.

    ever: all members that it has ever had, including pruned ones; () where none was pruned.
    """

    number: int
    urls: tuple[str, ...]
    ever: tuple[str, ...] = ()


def list_files(
    objects: Sequence[ObjectInfo], job: Job, groups: Sequence[Group]
) -> tuple[list[Shard], list[Group]]:
    """(the shards of all groups, the new groups).

    The new groups hold the files that no group has yet, in the order of their URLs.
    """
    by_url = {info.url: info for info in objects}
    grouped = {url for group in groups for url in group.urls}
    ungrouped = sorted(by_url.keys() - grouped)
    first_number = max((group.number for group in groups), default=-1) + 1
    starts = range(0, len(ungrouped), job.group_size)
    new = [
        Group(first_number + n, tuple(ungrouped[start : start + job.group_size]))
        for n, start in enumerate(starts)
    ]
    in_order = sorted([*groups, *new], key=lambda group: group.number)
    present = [group for group in in_order if any(url in by_url for url in group.urls)]
    return [_shard(group, by_url) for group in present], new


def read_files(shard: Shard, job: Job, is_wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The files of a group in order, then the End."""
    rows = (_row(index, member, job) for index, member in enumerate(shard.members))
    yield from read_in_order(rows, is_wanted, lambda index: shard.members[index].version)
    yield End(len(shard.members))


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """Text columns from the names of the files' folders. Raises JobError for any other column."""
    for name in job.keep:
        if not any(is_folder_column(name, member.url) for member in shard.members):
            raise JobError(
                f"keep: loose files have no columns, so {name} cannot be kept. `folder` keeps the "
                "name of each file's folder, and folders called name=value are columns too. "
                "Correct or remove `keep`."
            )
    return pa.schema([(name, pa.string()) for name in job.keep])


def _shard(group: Group, by_url: dict[str, ObjectInfo]) -> Shard:
    infos = [by_url.get(url, ObjectInfo(url, -1, "")) for url in group.urls]
    members = tuple(Member(info.url, info.size, info.version) for info in infos)
    versions = "\n".join(member.version for member in members)
    # The id depends on all members ever: after pruning it is a new version of the same shard,
    # which supersedes the old one.
    name = shard_id(f"files_{group.number:06d}", "\n".join(group.ever or group.urls), versions)
    return Shard(
        id=name,
        kind=ShardKind.FILES,
        url=os.path.commonprefix(group.urls).rpartition("/")[0],  # noqa: RUF071 (cut at the last slash)
        size=sum(max(0, member.size) for member in members),
        version=short_hash(versions, 32),
        rows=len(members),
        members=members,
        modified=max((info.modified for info in infos if info.modified is not None), default=None),
    )


def _row(index: int, member: Member, job: Job) -> Encoded:
    reason, message = _problem(member, job)
    passthrough = with_folder_columns(None, member.url, job)
    return Encoded(index, member.url, member.url, None, reason, message, passthrough)


def _problem(member: Member, job: Job) -> tuple[Reason | None, str]:
    """(reason, message) of a file that is not read; (None, "") of a file to read."""
    if member.size < 0:
        return Reason.MISSING, f"{member.url} {member.version or 'does not exist any more'}"
    if member.size > MAX_IMAGE_BYTES:
        return too_large(member.size)
    suffix = member.url.rpartition(".")[2].lower()
    # Camera raw begins like a TIFF whose first page is a thumbnail: content cannot tell.
    if suffix in CAMERA_RAW_SUFFIXES and job.rules >= SourceRules.V2:
        message = f"camera raw (.{suffix}) is not decoded: export it as JPEG or TIFF"
        return Reason.FORMAT_NOT_ALLOWED, message
    return None, ""
