"""Fragments: the rows of one fixed range of a shard, kept until the shard is whole.

A fragment is created if absent and never changes: of two runs that disagree on a bad row the first
one's word holds.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import NamedTuple

import pyarrow as pa

from vitray.dataset.files import under
from vitray.dataset.identity import Dataset
from vitray.errors import ObjectMissing
from vitray.schema import End, ipc_bytes, ipc_table
from vitray.storage import join, read, store_for

_FRAGMENT = re.compile(r"(\d{10})-(\d{10})\.arrow")
_SEAL = struct.Struct(
    "<4sI"
)  # behind the Arrow stream: a mark, and the CRC-32 of what stands before
_END = re.compile(r"end-(\d+)\.arrow")
_END_SCHEMA = pa.schema(
    [
        ("total", pa.int64()),
        ("truncated_at", pa.int64()),
        ("note", pa.string()),
        (
            "left_out",
            pa.string(),
        ),  # JSON, as image_members; ends written before December 2026 have neither
        ("image_members", pa.string()),
    ]
)


class Fragment(NamedTuple):
    """The good and the error rows of a fixed range, and what its images left out, by
    left_out.LEFT_OUT.
    """

    rows: pa.Table
    errors: pa.Table
    left_out: dict[str, int]


@dataclass(frozen=True, slots=True)
class Staged:
    """What is staged of a shard: fragments as {start: stop}, and the tails (more than one only if
    readers disagreed).
    """

    fragments: dict[int, int]
    ends: tuple[End, ...]

    def covers(self) -> bool:
        """Whether one tail is known and the fragments make up [0, total): no gap, and nothing
        behind the end.
        """
        if len(self.ends) != 1:
            return False
        edges = [0, *(edge for span in self.ranges() for edge in span), self.ends[0].total]
        return edges[::2] == edges[1::2]

    def ranges(self) -> list[tuple[int, int]]:
        return sorted(self.fragments.items())


def staged(dataset: Dataset, shard_id: str) -> Staged:
    """What is staged of a shard: fragments by names alone, tails read."""
    return _scan(dataset, shard_id)[0]


def staged_shards(dataset: Dataset) -> list[str]:
    """The ids of all shards that have staging."""
    inside = join(dataset.out, "_vitray", "staging")
    return sorted({info.url.removeprefix(inside + "/").split("/")[0] for info in under(inside)})


def staged_whole(dataset: Dataset, shard_id: str) -> Staged:
    """Like staged(), but every fragment was opened, and what is damaged deleted, to be made again.

    So is a fragment beyond the one known end: a reader that had seen more rows died. And one of
    another length: it is of a run with other `fragment_rows`, whose dataset.json is gone.
    """
    there, damaged = _scan(dataset, shard_id)
    rows = dataset.fragment_rows
    odd = [span for span in there.ranges() if span[0] % rows or span[1] - span[0] > rows]
    damaged += [_fragment_url(dataset, shard_id, *span) for span in odd]
    last = there.ends[0].total if len(there.ends) == 1 else None
    good = {}
    for start, stop in there.ranges():
        if (start, stop) in odd:
            continue
        try:
            whole = read_fragment(dataset, shard_id, start, stop) is not None
        except ObjectMissing:  # another run finished this shard and cleans up
            continue
        if whole and (last is None or stop <= last):
            good[start] = stop
        else:
            damaged.append(_fragment_url(dataset, shard_id, start, stop))
    store_for(dataset.out).delete(damaged)
    return Staged(good, there.ends)


def write_fragment(
    dataset: Dataset,
    shard_id: str,
    span: tuple[int, int],
    rows: pa.Table,
    errors: pa.Table,
    left_out: dict[str, int] | None = None,
) -> bool:
    """Stage the good and error rows of [start, stop). False: it was staged already, and what is
    there stays.
    """
    _require_span(rows, errors, span)
    metadata = {
        "errors": ipc_bytes(errors),
        "fingerprint": dataset.fingerprint,
        "left_out": json.dumps(left_out or {}),
    }
    marked = rows.replace_schema_metadata(metadata)
    return store_for(dataset.out).create(_fragment_url(dataset, shard_id, *span), _sealed(marked))


def read_fragment(dataset: Dataset, shard_id: str, start: int, stop: int) -> Fragment | None:
    """A fragment, None when it is not what its name says. Raises ObjectMissing when it is gone."""
    data = read(_fragment_url(dataset, shard_id, start, stop))
    try:
        rows = _unsealed(data)
        metadata = rows.schema.metadata or {}
        if metadata.get(b"fingerprint", b"").decode() != dataset.fingerprint:
            return None
        errors = ipc_table(metadata[b"errors"])
        left_out = json.loads(metadata.get(b"left_out", b"{}"))
        rows = rows.replace_schema_metadata(None)
        _require_span(rows, errors, (start, stop))
    except (ValueError, KeyError, OSError):  # pyarrow: a stream that ends too early is either
        return None
    return Fragment(rows, errors, left_out)


def write_end(dataset: Dataset, shard_id: str, end: End) -> None:
    row = {
        **asdict(end),
        "left_out": json.dumps(end.left_out),
        "image_members": json.dumps(end.image_members),
    }
    table = pa.Table.from_pylist([row], schema=_END_SCHEMA)
    store_for(dataset.out).create(
        join(dataset.staging_url(shard_id), f"end-{end.total}.arrow"), _sealed(table)
    )


def drop_staging(dataset: Dataset, shard_id: str) -> None:
    """Delete a shard's staging. Only after its data file was seen, or when its readers disagreed on
    its end.
    """
    store, folder = store_for(dataset.out), dataset.staging_url(shard_id)
    store.delete(info.url for info in under(folder))
    store.delete_folder(folder)


def _scan(dataset: Dataset, shard_id: str) -> tuple[Staged, list[str]]:
    """What is staged, and the URLs of damaged tails."""
    fragments: dict[int, int] = {}
    ends, damaged = [], []
    for info in under(dataset.staging_url(shard_id)):
        name = info.url.rsplit("/", 1)[-1]
        if match := _FRAGMENT.fullmatch(name):
            fragments[int(match[1])] = int(match[2])
        elif match := _END.fullmatch(name):
            try:
                ends.append(_read_end(info.url, int(match[1])))
            except ObjectMissing:  # another run finished this shard and cleans up
                continue
            except (ValueError, KeyError, OSError):
                damaged.append(info.url)
    return Staged(fragments, tuple(ends)), damaged


def _read_end(url: str, total: int) -> End:
    (row,) = _unsealed(read(url)).to_pylist()
    if row["total"] != total:
        raise ValueError(f"{url} says {row['total']}")
    counts = [json.loads(row.get(name) or "{}") for name in ("left_out", "image_members")]
    return End(total, row["truncated_at"], row["note"], *counts)


def _sealed(table: pa.Table) -> bytes:
    data = ipc_bytes(table)
    return data + _SEAL.pack(b"crc1", zlib.crc32(data))


def _unsealed(data: bytes) -> pa.Table:
    """Raises ValueError when a bit is not what was written: Arrow itself would not see it."""
    body = memoryview(data)[: -_SEAL.size]
    if data[-_SEAL.size :] != _SEAL.pack(b"crc1", zlib.crc32(body)):
        raise ValueError("damaged")
    return ipc_table(pa.py_buffer(body))


def _fragment_url(dataset: Dataset, shard_id: str, start: int, stop: int) -> str:
    return join(dataset.staging_url(shard_id), f"{start:010d}-{stop:010d}.arrow")


def _require_span(rows: pa.Table, errors: pa.Table, span: tuple[int, int]) -> None:
    good, bad = rows["index"].to_pylist(), errors["index"].to_pylist()
    if sorted(good + bad) != list(range(*span)) or good != sorted(good) or bad != sorted(bad):
        raise ValueError(f"rows and errors do not make up {span}")
