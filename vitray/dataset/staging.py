"""Fragments: the rows of one fixed range of a shard, staged until the shard is complete.

A fragment is created if absent and never changes. Where two runs disagree on a bad row, the row of
the first run stays.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import asdict, dataclass

import pyarrow as pa

from vitray.dataset.files import under
from vitray.dataset.identity import Dataset
from vitray.dataset.layout import staging_url
from vitray.dataset.removed_keys import Fragment, RemovedKeys, recent_removed_keys
from vitray.errors import ObjectMissing
from vitray.left_out import LeftOut
from vitray.schema import End, ipc_bytes, ipc_table
from vitray.storage import join, read, store_for

_FRAGMENT = re.compile(r"(\d{10})-(\d{10})\.arrow")
_SEAL = struct.Struct("<4sI")  # after the Arrow stream: "crc1", and the CRC-32 of the stream
_END = re.compile(r"end-(\d+)\.arrow")
_END_SCHEMA = pa.schema(
    [
        ("total", pa.int64()),
        ("truncated_at", pa.int64()),
        ("note", pa.string()),
        # JSON; ends written before December 2026 have neither
        ("left_out", pa.string()),
        ("image_members", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Staged:
    """The staged parts of a shard: fragments as {start: stop}, and its ends.

    There is more than one end only if readers disagreed.
    """

    fragments: dict[int, int]
    ends: tuple[End, ...]

    def covers(self) -> bool:
        """Whether there is one end and the fragments cover [0, total) exactly."""
        if len(self.ends) != 1:
            return False
        edges = [0, *(edge for span in self.ranges() for edge in span), self.ends[0].total]
        return edges[::2] == edges[1::2]

    def ranges(self) -> list[tuple[int, int]]:
        """(start, stop) of each fragment, in ascending order."""
        return sorted(self.fragments.items())


def list_staged(dataset: Dataset, shard_id: str) -> Staged:
    """The staged parts of a shard: fragments by their names alone, ends read."""
    return _scan(dataset, shard_id)[0]


def staged_shards(dataset: Dataset) -> list[str]:
    """The ids of all shards that have staging."""
    folder = staging_url(dataset.out)
    return sorted({info.url.removeprefix(folder + "/").split("/")[0] for info in under(folder)})


def repair_staging(dataset: Dataset, shard_id: str) -> Staged:
    """Open every fragment, delete those that must be made again, and return what remains:

    - damaged fragments;
    - fragments beyond the only end: a reader that saw more rows died;
    - fragments of another length: of a run with other `fragment_rows`, whose dataset.json is lost.
    """
    scan, unusable = _scan(dataset, shard_id)
    rows = dataset.fragment_rows
    total = scan.ends[0].total if len(scan.ends) == 1 else None
    intact = dict[int, int]()
    for start, stop in scan.ranges():
        has_length = start % rows == 0 and stop - start <= rows
        try:
            is_readable = has_length and _is_readable(dataset, shard_id, (start, stop))
        except ObjectMissing:  # another run finished this shard and cleans up
            continue
        if is_readable and (total is None or stop <= total):
            intact[start] = stop
        else:
            unusable.append(_fragment_url(dataset, shard_id, start, stop))
    store_for(dataset.out).delete(unusable)
    return Staged(intact, scan.ends)


def _is_readable(dataset: Dataset, shard_id: str, span: tuple[int, int]) -> bool:
    return read_fragment(dataset, shard_id, *span) is not None


def write_fragment(
    dataset: Dataset,
    shard_id: str,
    span: tuple[int, int],
    rows: pa.Table,
    errors: pa.Table,
    left_out: dict[str, int] | None = None,
) -> bool:
    """Stage the good and error rows of [start, stop). False: it was staged already, and stays.

    Rows with removed keys stay out, and are counted.
    """
    require_span(rows, errors, span)
    whole = Fragment(rows, errors, left_out or {})
    fragment = recent_removed_keys(dataset.out).filter(whole)
    metadata = {
        "errors": ipc_bytes(fragment.errors),
        "fingerprint": dataset.fingerprint,
        "left_out": json.dumps(fragment.left_out),
    }
    table = fragment.rows.replace_schema_metadata(metadata)
    return store_for(dataset.out).create(_fragment_url(dataset, shard_id, *span), _sealed(table))


def read_fragment(dataset: Dataset, shard_id: str, start: int, stop: int) -> Fragment | None:
    """A fragment; None when it is damaged or another dataset's. Raises ObjectMissing."""
    data = read(_fragment_url(dataset, shard_id, start, stop))
    try:
        rows = _unsealed(data)
        metadata = rows.schema.metadata or {}
        if metadata.get(b"fingerprint", b"").decode() != dataset.fingerprint:
            return None
        errors = ipc_table(metadata[b"errors"])
        left_out = json.loads(metadata.get(b"left_out", b"{}"))
        rows = rows.replace_schema_metadata(None)
        require_span(rows, errors, (start, stop), left_out.get(LeftOut.REMOVED, 0))
    except (ValueError, KeyError, OSError):  # pyarrow: a stream that ends too early is either
        return None
    return Fragment(rows, errors, left_out)


def write_end(dataset: Dataset, shard_id: str, end: End) -> None:
    """Stage the end of a shard; does nothing where an end with that total is staged."""
    row = {
        **asdict(end),
        "left_out": json.dumps(end.left_out),
        "image_members": json.dumps(end.image_members),
    }
    table = pa.Table.from_pylist([row], schema=_END_SCHEMA)
    store_for(dataset.out).create(
        join(dataset.staging_url(shard_id), f"end-{end.total}.arrow"), _sealed(table)
    )


def drop_removed_fragments(dataset: Dataset, removed: RemovedKeys, only_look: bool = False) -> int:
    """Delete staged fragments that hold a removed key; the next run computes them again.

    only_look: count them alone. Returns their number.
    """
    holding = list[str]()
    for shard in staged_shards(dataset):
        for start, stop in list_staged(dataset, shard).ranges():
            try:
                fragment = read_fragment(dataset, shard, start, stop)
            except ObjectMissing:  # a run committed the shard meanwhile
                continue
            if fragment is not None and removed.filter(fragment) is not fragment:
                holding.append(_fragment_url(dataset, shard, start, stop))
    if not only_look:
        store_for(dataset.out).delete(holding)
    return len(holding)


def drop_staging(dataset: Dataset, shard_id: str) -> None:
    """Delete a shard's staging.

    Call it only after its data file was seen, or when its readers disagreed on its end.
    """
    store = store_for(dataset.out)
    folder = dataset.staging_url(shard_id)
    store.delete(info.url for info in under(folder))
    store.delete_folder(folder)


def _scan(dataset: Dataset, shard_id: str) -> tuple[Staged, list[str]]:
    """The staged parts, and the URLs of damaged ends."""
    fragments: dict[int, int] = {}
    ends = []
    damaged = []
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
        raise ValueError(f"{url} holds the total {row['total']}")
    return End(
        total=total,
        truncated_at=row["truncated_at"],
        note=row["note"],
        left_out=json.loads(row.get("left_out") or "{}"),
        image_members=json.loads(row.get("image_members") or "{}"),
    )


def _sealed(table: pa.Table) -> bytes:
    data = ipc_bytes(table)
    return data + _SEAL.pack(b"crc1", zlib.crc32(data))


def _unsealed(data: bytes) -> pa.Table:
    """The table of sealed bytes. Raises ValueError for a flipped bit, which Arrow would not see."""
    body = memoryview(data)[: -_SEAL.size]
    if data[-_SEAL.size :] != _SEAL.pack(b"crc1", zlib.crc32(body)):
        raise ValueError("damaged")
    return ipc_table(pa.py_buffer(body))


def _fragment_url(dataset: Dataset, shard_id: str, start: int, stop: int) -> str:
    return join(dataset.staging_url(shard_id), f"{start:010d}-{stop:010d}.arrow")


def require_span(rows: pa.Table, errors: pa.Table, span: tuple[int, int], removed: int = 0) -> None:
    """Raises ValueError where rows and errors are not the rows of [start, stop), each in order.

    removed: how many rows of the range were left out, because their keys are blocked.
    """
    good, bad = rows["index"].to_pylist(), errors["index"].to_pylist()
    in_span = set(good + bad) <= set(range(*span))
    is_whole = in_span and len({*good, *bad}) == len(good + bad) == span[1] - span[0] - removed
    if not is_whole or good != sorted(good) or bad != sorted(bad):
        raise ValueError(f"rows and errors do not make up {span}")
