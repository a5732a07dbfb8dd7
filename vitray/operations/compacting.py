"""Few large files instead of one per shard: the same rows in the same order.

A part is named by a hash of the data files that it gathers, and is created once. So the same call
continues after a kill, and after the dataset has grown it adds only what is new. `_COMPACT.json` is
written last: it exists exactly while all parts exist, and no others. Until then `_COMPACTING.json`
names the dataset that the parts belong to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from vitray.dataset import (
    COMPACTED,
    Dataset,
    committed_files,
    data_files,
    parquet_of,
    read_table,
    require_complete,
    require_outside,
    rows_in,
)
from vitray.errors import JobError, ObjectMissing, count
from vitray.storage import absolute, exists, join, read, store_for

PART = "part-"
COMPLETE, STARTED = COMPACTED
PART_NAME = re.compile(r"part-\d{5}-[0-9a-f]{12}\.parquet")
Group = list[tuple[str, str]]  # URL and version of the data files of a part


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was gathered. files: data files; parts: all that exist; written: by this call."""

    into: str
    files: int
    parts: int
    written: int
    rows: int

    def __str__(self) -> str:
        parts = f"{count(self.parts, 'part')}, {self.written} of them written now"
        return (
            f"{self.into}: {count(self.files, 'data file')} in {parts}, {count(self.rows, 'row')}"
        )


def compact(out: str, into: str, megabytes: int = 256) -> Compaction:
    """Gather the data files of a complete dataset into larger files.

    Each has at least `megabytes` MB, except the last. Raises JobError if `out` is not complete, or
    if `into` holds something else, such as another dataset's parts.
    """
    dataset = require_complete(out)
    into = absolute(into)
    require_outside(dataset, "--into", into)
    existing = _existing_parts(into)
    groups = {
        _part_name(number, group): group
        for number, group in enumerate(_groups(dataset, megabytes * 1_000_000))
    }
    owner = {"source": dataset.out, "fingerprint": dataset.fingerprint}
    markers = _markers(into)
    for marker in markers.values():
        if marker["source"] != dataset.out:
            raise JobError(
                f"--into {into} holds the rows of {marker['source']}: choose an empty directory."
            )
    is_owner = COMPLETE in markers and markers[COMPLETE].items() >= owner.items()
    if not is_owner or groups.keys() != existing:
        _make_parts(dataset, into, groups, existing, owner)
    return Compaction(
        into=into,
        files=_file_count(groups),
        parts=len(groups),
        written=len(groups.keys() - existing),
        rows=sum(rows_in(join(into, name)) for name in groups),
    )


def _markers(into: str) -> dict[str, dict[str, object]]:
    """The contents of _COMPACT.json and _COMPACTING.json, of those that exist."""
    urls = {name: join(into, name) for name in (COMPLETE, STARTED)}
    return {name: json.loads(read(url)) for name, url in urls.items() if exists(url)}


def _make_parts(
    dataset: Dataset,
    into: str,
    groups: dict[str, Group],
    existing: set[str],
    owner: dict[str, str],
) -> None:
    """Write missing parts and delete those of another grouping, between the two markers."""
    complete_url = join(into, COMPLETE)
    started_url = join(into, STARTED)
    store_for(started_url).replace(started_url, json.dumps(owner).encode())
    store_for(complete_url).delete([complete_url])
    for name in groups.keys() - existing:
        write_part(dataset, groups[name], join(into, name))
    store_for(into).delete([join(into, name) for name in existing - groups.keys()])
    marker = {**owner, "parts": sorted(groups), "files": _file_count(groups)}
    store_for(complete_url).replace(complete_url, json.dumps(marker, indent=1).encode())
    store_for(started_url).delete([started_url])


def _file_count(groups: dict[str, Group]) -> int:
    return sum(len(group) for group in groups.values())


def _existing_parts(into: str) -> set[str]:
    """Names of the parts in a directory. Raises JobError if it holds anything else."""
    try:
        names = {info.url.removeprefix(f"{into}/") for info in store_for(into).find(into)}
    except ObjectMissing:
        return set()
    parts = set()
    if COMPLETE in names or STARTED in names:  # one of them is older than the first part
        parts = {name for name in names if PART_NAME.fullmatch(name)}
    if foreign := sorted(names - parts - {COMPLETE, STARTED}):
        raise JobError(
            f"--into {into} holds {foreign[0]}, which vitray compact did not write: "
            "choose an empty directory."
        )
    return parts


def _groups(dataset: Dataset, size_bytes: int) -> Iterator[Group]:
    """The data files, in order, in groups of at least `size_bytes` bytes."""
    infos = {info.url: info for info in committed_files(dataset.out).values()}
    group: Group = []
    group_bytes = 0
    for url in data_files(dataset.out):
        group.append((url, infos[url].version))
        group_bytes += infos[url].size
        if group_bytes >= size_bytes:
            yield group
            group = []
            group_bytes = 0
    if group:
        yield group


def _part_name(number: int, group: Group) -> str:
    digest = hashlib.sha256(json.dumps(group).encode()).hexdigest()
    return f"{PART}{number:05d}-{digest[:12]}.parquet"


def write_part(dataset: Dataset, group: Group, url: str) -> None:
    """Write the rows of a group of data files as one Parquet file."""

    def tables() -> Iterator[pa.Table]:
        for source, version in group:
            with store_for(source).open(source, version) as stream:
                yield read_table(stream)

    metadata = {"vitray.fingerprint": dataset.fingerprint, "vitray.files": str(len(group))}
    data, _ = parquet_of(dataset, tables(), lambda: metadata)
    store_for(url).create(url, data)  # refused if another call gathered the same files
