"""Parquet files with the images inside: whole, or in ranges of whole row groups. Private to this room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa

from vitray.job import Job
from vitray.schema import Encoded, End, Shard
from vitray.sources.objects import MAX_IMAGE_BYTES, open_shard, part_of, printable, too_large
from vitray.sources.tables import columns_to_read, key_of, open_parquet, python_value, read_cells

MAX_SHARD_ROWS = 20_000  # a few minutes of one accelerator, so that a set of large files still spreads
MAX_SHARD_BYTES = 1 << 30


def split_parquet(whole: Shard) -> list[Shard]:
    """Whole row groups together until the next one would go over the size of a shard. Raises ShardError."""
    with open_shard(whole) as stream, open_parquet(stream, whole.url) as file:
        groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
        rows = [0, *accumulate(group.num_rows for group in groups)]
        ends = [0, *accumulate(sum(g.column(n).total_compressed_size for n in range(g.num_columns)) for g in groups)]
    starts = [0]
    for n in range(1, len(groups)):
        if rows[n + 1] - rows[starts[-1]] > MAX_SHARD_ROWS or ends[n + 1] - ends[starts[-1]] > MAX_SHARD_BYTES:
            starts.append(n)
    if len(starts) == 1:
        return [replace(whole, rows=rows[-1])]
    spans = zip(starts, [*starts[1:], len(groups)])
    return [part_of(whole, "rg", rows[b] - rows[a], ends[b] - ends[a], (a, b)) for a, b in spans]


def read_parquet(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The rows of a file or of its range of row groups, batch by batch, then the End."""
    with open_shard(shard) as stream, open_parquet(stream, shard.url) as file:
        names = columns_to_read(file.schema_arrow, shard.kind, job)
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        first, total = sum(counts[: shard.start]), sum(counts[shard.start : shard.stop or None])
        for row, cells in read_cells(file, names, range(first, first + total), lambda row: wanted(row - first)):
            path, data = _path_and_bytes(cells[names[0]])
            key = key_of(python_value(cells[job.key_column]) if job.key_column else None, path, row)
            kept = tuple(python_value(cells[name]) for name in job.keep)
            yield Encoded(row - first, key, shard.url, *_content(data, path), kept)
    yield End(total)


def _path_and_bytes(cell: pa.Scalar) -> tuple[object, pa.Scalar]:
    """A Hugging Face image is a struct<bytes, path>; a null one has null fields."""
    if not pa.types.is_struct(cell.type):
        return None, cell
    return python_value(cell["path"]) if "path" in cell else None, cell["bytes"]


def _content(data: pa.Scalar, path: object) -> tuple[bytes | None, str | None, str]:
    """(bytes, None, "") or (None, reason, message)."""
    if not data.is_valid:
        what = f", only the path {printable(str(path))[:200]}; only bytes inside the file are read" if path else ""
        return None, "missing", f"the row holds no image bytes{what}"
    if data.as_buffer().size > MAX_IMAGE_BYTES:
        return None, *too_large(data.as_buffer().size)
    return data.as_buffer().to_pybytes(), None, ""
