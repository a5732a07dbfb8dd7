"""The files of OUT, found and read whole; the log of groups and the run records, which are nothing
more than that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.identity import Dataset
from vitray.errors import ObjectMissing, StorageError
from vitray.storage import ObjectInfo, absolute, join, read, store_for

NO_GROUP = -1


def under(out: str, *parts: str) -> list[ObjectInfo]:
    """Every object below a folder of OUT, in the order of URLs; none when there is no such
    folder.
    """
    try:
        return store_for(out).find(join(out, *parts))
    except ObjectMissing:
        return []


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file as a table, read by this thread alone. source: a stream or a pa.BufferReader.

    A thread of pyarrow's pool that still holds a Python buffer when the interpreter ends aborts the
    process.
    """
    return pq.ParquetFile(source, pre_buffer=False).read(
        columns=columns and list(columns), use_threads=False
    )


def read_parquet(url: str) -> pa.Table:
    """A manifest, or a part of the log of groups. Raises StorageError when it is damaged."""
    try:
        return read_table(pa.BufferReader(read(url)))
    except (pa.ArrowException, OSError) as error:
        step = "Delete it and run the job again: it is made anew from data/."
        if "/_vitray/shards/" in url:
            step = (
                "It holds which files are in which shard: bring a copy back, or choose another "
                "`out`."
            )
        raise StorageError(f"{url} is damaged ({error}). {step}") from error


def parquet_bytes(table: pa.Table) -> bytes:
    """One table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def load_group_log(out: str) -> list[tuple[int, str]]:
    """(group number, url) of every grouped object, in the order of the log; NO_GROUP where it left
    its group.
    """
    parts = [read_parquet(info.url) for info in under(out, "_vitray", "shards")]
    return [
        member
        for part in parts
        for member in zip(part["group"].to_pylist(), part["url"].to_pylist())
    ]


def append_group_log(out: str, members: Sequence[tuple[int, str]]) -> bool:
    """Append new groups, or objects that leave theirs. False: another run was faster (with a group
    or a URL); read and plan again.
    """
    # the number of parts is read before their content: what is appended after that takes the name
    # that we want
    name = f"{len(under(out, '_vitray', 'shards')):06d}.parquet"
    groups, urls = zip(*members)
    known = load_group_log(out)
    numbers, housed = {group for group, _ in known if group != NO_GROUP}, set[str]()
    for _, url in known:
        housed ^= {url}  # an object enters and leaves in turn
    for group, url in members:
        if group in numbers or (url in housed) != (group == NO_GROUP):
            return False
        housed ^= {url}
    table = pa.table({"group": pa.array(groups, pa.int32()), "url": pa.array(urls, pa.string())})
    return store_for(out).create(join(out, "_vitray", "shards", name), parquet_bytes(table))


def go_on_with_groups(old: str, new: str) -> None:
    """Loose files get in `new` the groups that they have in `old`, so that both have the same
    shards; what `new` began otherwise stays.
    """
    theirs, mine = load_group_log(absolute(old)), load_group_log(absolute(new))
    if len(theirs) > len(mine) and theirs[: len(mine)] == mine:
        append_group_log(absolute(new), theirs[len(mine) :])  # refused: another call did the same


def write_run_record(dataset: Dataset, run_id: str, record: dict[str, object]) -> None:
    store_for(dataset.out).create(
        join(dataset.out, "_vitray", "runs", f"{run_id}.json"),
        json.dumps(record, indent=1).encode(),
    )


def read_run_records(out: str) -> list[dict[str, Any]]:
    """Every run record, oldest first."""
    return [json.loads(read(info.url)) for info in under(out, "_vitray", "runs")]
