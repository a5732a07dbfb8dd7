"""Listing and reading the files of an output directory; the log of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.layout import group_log_url, is_group_log
from vitray.errors import ObjectMissing, StorageError
from vitray.storage import ObjectInfo, absolute, join, read, store_for

NO_GROUP = -1  # the group number of an object that leaves its group


def under(url: str, *parts: str) -> list[ObjectInfo]:
    """Every object below a folder, in the order of URLs; none when there is no such folder."""
    try:
        return store_for(url).find(join(url, *parts))
    except ObjectMissing:
        return []


def read_table(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """A Parquet file as a table, read by this thread alone.

    source: a stream or a pa.BufferReader. A thread of pyarrow's pool that still has a Python buffer
    when the interpreter ends aborts the process.
    """
    return pq.ParquetFile(source, pre_buffer=False).read(
        columns=columns and list(columns), use_threads=False
    )


def read_parquet(url: str) -> pa.Table:
    """A manifest, or a part of the log of groups. Raises StorageError when it is damaged."""
    try:
        return read_table(pa.BufferReader(read(url)))
    except (pa.ArrowException, OSError) as error:
        step = "Delete it and run the job again, which makes a new one from data/."
        if is_group_log(url):
            step = (
                "It holds which files are in which shard: restore a copy, or choose another `out`."
            )
        raise StorageError(f"{url} is damaged ({error}). {step}") from error


def parquet_bytes(table: pa.Table) -> bytes:
    """One table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def load_group_log(out: str) -> list[tuple[int, str]]:
    """(group number, url) of every grouped object, in the order of the log.

    The number is NO_GROUP where the object left its group.
    """
    members = list[tuple[int, str]]()
    for info in under(group_log_url(out)):
        part = read_parquet(info.url)
        members += zip(part["group"].to_pylist(), part["url"].to_pylist())
    return members


def append_group_log(out: str, members: Sequence[tuple[int, str]]) -> bool:
    """Append new groups, or objects that leave theirs.

    False: another run appended one of the groups or URLs first; read and plan again.
    """
    # the parts are counted before they are read: one that is appended meanwhile has the same name
    name = f"{len(under(group_log_url(out))):06d}.parquet"
    groups, urls = zip(*members)
    log = load_group_log(out)
    numbers = {group for group, _ in log if group != NO_GROUP}
    grouped_urls = set[str]()
    for _, url in log:
        grouped_urls ^= {url}  # an object enters and leaves in turn
    for group, url in members:
        if group in numbers or (url in grouped_urls) != (group == NO_GROUP):
            return False
        grouped_urls ^= {url}
    table = pa.table({"group": pa.array(groups, pa.int32()), "url": pa.array(urls, pa.string())})
    return store_for(out).create(group_log_url(out, name), parquet_bytes(table))


def copy_groups(old: str, new: str) -> None:
    """Give loose files in `new` the groups that they have in `old`: both have the same shards then.

    Groups that `new` began otherwise stay.
    """
    old_log, new_log = load_group_log(absolute(old)), load_group_log(absolute(new))
    count = len(new_log)
    if len(old_log) > count and old_log[:count] == new_log:
        append_group_log(absolute(new), old_log[count:])  # refused: another call did the same
