"""Loose image files, in groups whose membership is fixed for ever. Private to this package."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from vitray.errors import JobError
from vitray.job import Job
from vitray.schema import CAMERA_RAW_SUFFIXES, Encoded, End, Member, Shard, short_hash
from vitray.sources.names import is_folder_column
from vitray.sources.objects import MAX_IMAGE_BYTES, follow, shard_id, too_large
from vitray.sources.tables import with_folder_columns
from vitray.storage import ObjectInfo


@dataclass(frozen=True, slots=True)
class Group:
    """The membership of a group of loose files. ever: with those that were pruned, fixed for ever;
    () where none was.
    """

    number: int
    urls: tuple[str, ...]
    ever: tuple[str, ...] = ()


def list_files(
    found: Sequence[ObjectInfo], job: Job, groups: Sequence[Group]
) -> tuple[list[Shard], list[Group]]:
    """The shards of known and new groups, and the new groups: files that no group holds yet, in the
    order of URLs.
    """
    by_url = {info.url: info for info in found}
    known = {url for group in groups for url in group.urls}
    fresh = sorted(by_url.keys() - known)
    first = max((group.number for group in groups), default=-1) + 1
    starts = range(0, len(fresh), job.group_size)
    new = [
        Group(first + n, tuple(fresh[start : start + job.group_size]))
        for n, start in enumerate(starts)
    ]
    everyone = sorted([*groups, *new], key=lambda group: group.number)
    return [
        _shard(group, by_url) for group in everyone if any(url in by_url for url in group.urls)
    ], new


def read_files(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The files of a group in order, then the End."""
    rows = (_row(index, member, job) for index, member in enumerate(shard.members))
    yield from follow(rows, wanted, lambda index: shard.members[index].version)
    yield End(len(shard.members))


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """Text columns that the folders of the files spell out. Raises JobError for any other
    column.
    """
    for name in job.keep:
        if not any(is_folder_column(name, member.url) for member in shard.members):
            raise JobError(
                f"keep: loose files have no columns, so {name} cannot be kept. `folder` keeps the "
                f"name of each file's folder, "
                "and folders called name=value are columns too. Correct or remove `keep`."
            )
    return pa.schema([(name, pa.string()) for name in job.keep])


def _shard(group: Group, by_url: dict[str, ObjectInfo]) -> Shard:
    infos = [by_url.get(url, ObjectInfo(url, -1, "")) for url in group.urls]
    members = tuple(Member(info.url, info.size, info.version) for info in infos)
    versions = "\n".join(member.version for member in members)
    return Shard(
        # of all that ever were in it: with some pruned it is a new version, which supersedes the
        # old one
        id=shard_id(f"files_{group.number:06d}", "\n".join(group.ever or group.urls), versions),
        kind="files",
        url=os.path.commonprefix(group.urls).rpartition("/")[0],  # noqa: RUF071 (cut at the last slash)
        size=sum(max(0, member.size) for member in members),
        version=short_hash(versions, 32),
        rows=len(members),
        members=members,
        modified=max((info.modified for info in infos if info.modified is not None), default=None),
    )


def _row(index: int, member: Member, job: Job) -> Encoded:
    reason, message = None, ""
    suffix = member.url.rpartition(".")[2].lower()
    if member.size < 0:
        reason, message = "missing", f"{member.url} {member.version or 'does not exist any more'}"
    elif member.size > MAX_IMAGE_BYTES:
        reason, message = too_large(member.size)
    elif (
        suffix in CAMERA_RAW_SUFFIXES and job.rules > 1
    ):  # it begins like a TIFF whose first page is a thumbnail
        reason, message = (
            "format_not_allowed",
            f"camera raw (.{suffix}) is not decoded: export it as JPEG or TIFF",
        )
    return Encoded(
        index,
        member.url,
        member.url,
        None,
        reason,
        message,
        with_folder_columns(None, member.url, job),
    )
