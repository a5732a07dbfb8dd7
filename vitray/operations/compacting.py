"""Few large files instead of one a shard: the same rows in the same order, for readers that want
few.

A part is named by a hash of the data files that it gathers and is created once, so that the same
call goes on after a kill and does only what is new when the dataset has grown. `_COMPACT.json`
comes last: it is there exactly while all parts are, and none besides; until then `_COMPACTING.json`
says whose they are.
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
    committed,
    data_files,
    parquet_of,
    read_table,
    require_complete,
    require_outside,
    rows_in,
)
from vitray.errors import JobError, ObjectMissing, count
from vitray.storage import absolute, exists, join, read, store_for

PART, (WHOLE, BEGUN) = "part-", COMPACTED
OURS = re.compile(r"part-\d{5}-[0-9a-f]{12}\.parquet")


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was gathered. written: parts made by this call; parts: all there are."""

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
    """Gather the data files of a complete dataset into files of at least so many megabytes each,
    but for the last.

    Raises JobError when `out` is not complete or `into` holds something else, such as another
    dataset's parts.
    """
    dataset, into = require_complete(out), absolute(into)
    require_outside(dataset, "--into", into)
    there = _parts_there(into)
    groups = {
        _name(n, group): group for n, group in enumerate(_grouped(dataset, megabytes * 1_000_000))
    }
    mark, begun, told = (
        join(into, WHOLE),
        join(into, BEGUN),
        {"source": dataset.out, "fingerprint": dataset.fingerprint},
    )
    metadata = [json.loads(read(url)) for url in (mark, begun) if exists(url)]
    if others := [said["source"] for said in metadata if said["source"] != dataset.out]:
        raise JobError(f"--into {into} holds the rows of {others[0]}: choose an empty directory.")
    if not (exists(mark) and groups.keys() == there and metadata[0].items() >= told.items()):
        store_for(begun).replace(begun, json.dumps(told).encode())
        store_for(mark).delete([mark])
        for name in groups.keys() - there:
            _write(dataset, groups[name], join(into, name))
        store_for(into).delete([join(into, name) for name in there - groups.keys()])
        whole = {**told, "parts": sorted(groups), "files": sum(map(len, groups.values()))}
        store_for(mark).replace(mark, json.dumps(whole, indent=1).encode())
        store_for(begun).delete([begun])
    rows = sum(rows_in(join(into, name)) for name in groups)
    return Compaction(
        into, sum(map(len, groups.values())), len(groups), len(groups.keys() - there), rows
    )


def _parts_there(into: str) -> set[str]:
    try:
        names = {info.url.removeprefix(f"{into}/") for info in store_for(into).find(into)}
    except ObjectMissing:
        return set()
    is_marked = bool(names & {WHOLE, BEGUN})  # before the first part
    ours = {name for name in names if is_marked and OURS.fullmatch(name)}
    if foreign := sorted(names - ours - {WHOLE, BEGUN}):
        raise JobError(
            f"--into {into} holds {foreign[0]}, which is no part of ours: choose an empty "
            f"directory."
        )
    return ours


def _grouped(dataset: Dataset, size_bytes: int) -> Iterator[list[tuple[str, str]]]:
    """URL and version of data files, in order, in groups of at least so many bytes."""
    infos = {info.url: info for info in committed(dataset.out).values()}
    group, held = list[tuple[str, str]](), 0
    for url in data_files(dataset.out):
        group.append((url, infos[url].version))
        held += infos[url].size
        if held >= size_bytes:
            yield group
            group, held = [], 0
    if group:
        yield group


def _name(number: int, group: list[tuple[str, str]]) -> str:
    return (
        f"{PART}{number:05d}-{hashlib.sha256(json.dumps(group).encode()).hexdigest()[:12]}.parquet"
    )


def _write(dataset: Dataset, group: list[tuple[str, str]], url: str) -> None:
    def tables() -> Iterator[pa.Table]:
        for source, version in group:
            with store_for(source).open(source, version) as stream:
                yield read_table(stream)

    metadata = {"vitray.fingerprint": dataset.fingerprint, "vitray.files": str(len(group))}
    data, _ = parquet_of(dataset, tables(), lambda: metadata)
    store_for(url).create(url, data)  # refused: another call gathered the same files
