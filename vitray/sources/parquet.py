"""Parquet files that contain the images; a shard is a file or a range of its row groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa

from vitray.arrow_types import is_list
from vitray.job import Job
from vitray.left_out import LeftOut
from vitray.schema import Encoded, End, PassthroughRow, Reason, Shard, SourceRules
from vitray.sources.manifest import allowed_prefixes, resolve_path
from vitray.sources.objects import (
    MAX_IMAGE_BYTES,
    open_shard,
    part_of,
    printable,
    read_each,
    too_large,
)
from vitray.sources.tables import (
    columns_to_read,
    key_of,
    key_values,
    open_parquet,
    other_image_columns,
    passthrough_batch,
    python_value,
    read_batches,
    with_folder_columns,
)

# A few minutes of one accelerator, so that a few large files still spread over a cluster.
MAX_SHARD_ROWS = 20_000
MAX_SHARD_BYTES = 1 << 30


def split_parquet(shard: Shard) -> list[Shard]:
    """Ranges of row groups, each as long as a shard may be. Raises ShardError."""
    with open_shard(shard) as stream, open_parquet(stream, shard.url) as file:
        groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
        row_ends = [0, *accumulate(group.num_rows for group in groups)]
        size_ends = [0, *accumulate(map(_compressed_size, groups))]
    starts = [0]
    for n in range(1, len(groups)):
        rows = row_ends[n + 1] - row_ends[starts[-1]]
        size = size_ends[n + 1] - size_ends[starts[-1]]
        if rows > MAX_SHARD_ROWS or size > MAX_SHARD_BYTES:
            starts.append(n)
    if len(starts) == 1:
        return [replace(shard, rows=row_ends[-1])]
    return [
        part_of(shard, "rg", row_ends[b] - row_ends[a], size_ends[b] - size_ends[a], (a, b))
        for a, b in zip(starts, [*starts[1:], len(groups)])
    ]


def _compressed_size(group: Any) -> int:
    return sum(group.column(n).total_compressed_size for n in range(group.num_columns))


def read_parquet(
    shard: Shard, job: Job, is_wanted: Callable[[int], bool]
) -> Iterator[Encoded | End]:
    """The rows of a file or of its range of row groups, batch by batch, then the End."""
    with open_shard(shard) as stream, open_parquet(stream, shard.url) as file:
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        first = sum(counts[: shard.start])
        total = sum(counts[shard.start : shard.stop or None])
        left_out = _in_other_columns(file, shard, job) if job.rules >= SourceRules.V2 else {}
        rows = _rows(file, shard, job, range(first, first + total), is_wanted)
        yield from rows if job.rules == SourceRules.V1 else read_each(rows, is_wanted)
        note = ""
        if job.key_column and job.key_column not in file.schema_arrow.names:
            note = f"no column `{job.key_column}` here: rows are named by their number"
    yield End(total, note=note, left_out=left_out)


def _in_other_columns(file: Any, shard: Shard, job: Job) -> dict[str, int]:
    """How many images are in columns that are not read, by the statistics of the row groups."""
    metadata = file.metadata
    if not metadata.num_row_groups:
        return {}
    first_group = metadata.row_group(0)
    column_of = {first_group.column(n).path_in_schema: n for n in range(metadata.num_columns)}
    stop = shard.stop or metadata.num_row_groups
    groups = [metadata.row_group(n) for n in range(shard.start, stop)]
    images = 0
    for name in other_image_columns(file.schema_arrow, shard, job):
        column = column_of.get(name, column_of.get(f"{name}.bytes"))
        if column is not None:
            images += sum(group.num_rows - _null_count(group.column(column)) for group in groups)
    return {LeftOut.FURTHER_IMAGE: images} if images else {}


def _null_count(column: Any) -> int:
    """The nulls in a column chunk; 0 where its statistics do not count them."""
    statistics = column.statistics
    if statistics is None or not statistics.has_null_count:
        return 0
    return int(statistics.null_count)


def _rows(
    file: Any, shard: Shard, job: Job, rows: range, is_wanted: Callable[[int], bool]
) -> Iterator[Encoded]:
    """The wanted rows of a range of the file's rows.

    A row without bytes has no reason yet where its path may be read.
    """
    names = columns_to_read(file.schema_arrow, shard, job)
    batches = read_batches(file, names, rows, lambda row: is_wanted(row - rows.start))
    for first_row, batch, positions in batches:
        images, further = _first_images(batch.column(names[0]))
        passthrough = passthrough_batch(batch, job) if job.keep else None
        keys = key_values(batch, job)
        for n in positions:
            path, data = _path_and_bytes(images[n])
            row = first_row + n
            key = None if keys is None else python_value(keys[n])
            values = passthrough and PassthroughRow(passthrough, n)
            item = Encoded(
                row - rows.start,
                key_of(key, path, row),
                shard.url,
                None,
                passthrough=with_folder_columns(values, shard.url, job),
                further_images=further[n],
            )
            yield _with_content(item, data, path, shard, job)


def _first_images(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """(a column with one image per row, the number of further images of each row).

    Of a list the first image is taken. A dictionary (a pandas category, a Polars categorical)
    becomes its values.
    """
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode(), [0] * len(column)
    if is_list(column.type):
        rows = [_images_of(row) for row in column]
        firsts = [images[0].as_py() if images else None for images in rows]
        further = [max(0, len(images) - 1) for images in rows]
        return pa.array(firsts, column.type.value_type), further
    return column, [0] * len(column)


def _images_of(row: pa.Scalar) -> list[pa.Scalar]:
    """The images of a list that are not null."""
    return [image for image in row.values if image.is_valid] if row.is_valid else []


def _path_and_bytes(cell: pa.Scalar) -> tuple[object, pa.Scalar]:
    """A Hugging Face image is a struct<bytes, path>; a null one has null fields."""
    if not pa.types.is_struct(cell.type):
        return None, cell
    data = cell["bytes"] if "bytes" in cell else pa.scalar(None, pa.binary())
    return python_value(cell["path"]) if "path" in cell else None, data


def _with_content(item: Encoded, data: pa.Scalar, path: object, shard: Shard, job: Job) -> Encoded:
    """The row with its bytes, with the URL that its path names, or with a reason for neither."""
    if pa.types.is_dictionary(data.type):
        data = data.value
    if not data.is_valid and path and job.rules >= SourceRules.V2:
        located, spellings = resolve_path(path, shard, allowed_prefixes(shard, job), job)
        uri = located[0] or shard.url
        _, reason, message = located
        return replace(item, uri=uri, reason=reason, message=message, spellings=spellings)
    if not data.is_valid:
        message = "the row holds no image bytes"
        if path:
            shown = printable(str(path))[:200]
            message += f", only the path {shown}; only bytes inside the file are read"
        return replace(item, reason=Reason.MISSING, message=message)
    if data.as_buffer().size > MAX_IMAGE_BYTES:
        reason, message = too_large(data.as_buffer().size)
        return replace(item, reason=reason, message=message)
    return replace(item, data=data.as_buffer().to_pybytes())
