"""Parquet files with the images inside: whole, or in ranges of whole row groups. Private to this
package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pyarrow as pa

from vitray.job import Job
from vitray.left_out import LeftOut
from vitray.schema import Encoded, End, PassthroughRow, Shard
from vitray.sources.manifest import allowed_prefixes, follow_path
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
    is_list,
    key_of,
    key_values,
    open_parquet,
    other_image_columns,
    passthrough_batch,
    python_value,
    read_batches,
    with_folder_columns,
)

MAX_SHARD_ROWS = (
    20_000  # a few minutes of one accelerator, so that a set of large files still spreads
)
MAX_SHARD_BYTES = 1 << 30


def split_parquet(whole: Shard) -> list[Shard]:
    """Whole row groups together until the next one would go over the size of a shard. Raises
    ShardError.
    """
    with open_shard(whole) as stream, open_parquet(stream, whole.url) as file:
        groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
        rows = [0, *accumulate(group.num_rows for group in groups)]
        ends = [
            0,
            *accumulate(
                sum(g.column(n).total_compressed_size for n in range(g.num_columns)) for g in groups
            ),
        ]
    starts = [0]
    for n in range(1, len(groups)):
        if (
            rows[n + 1] - rows[starts[-1]] > MAX_SHARD_ROWS
            or ends[n + 1] - ends[starts[-1]] > MAX_SHARD_BYTES
        ):
            starts.append(n)
    if len(starts) == 1:
        return [replace(whole, rows=rows[-1])]
    spans = zip(starts, [*starts[1:], len(groups)])
    return [part_of(whole, "rg", rows[b] - rows[a], ends[b] - ends[a], (a, b)) for a, b in spans]


def read_parquet(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The rows of a file or of its range of row groups, batch by batch, then the End."""
    with open_shard(shard) as stream, open_parquet(stream, shard.url) as file:
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        first, total = sum(counts[: shard.start]), sum(counts[shard.start : shard.stop or None])
        left_out = _in_other_columns(file, shard, job) if job.rules > 1 else {}
        rows = _rows(file, shard, job, range(first, first + total), wanted)
        yield from rows if job.rules == 1 else read_each(rows, wanted)
        note = ""
        if job.key_column and job.key_column not in file.schema_arrow.names:
            note = f"no column `{job.key_column}` here: rows are named by their number"
    yield End(total, note=note, left_out=left_out)


def _in_other_columns(file: Any, shard: Shard, job: Job) -> dict[str, int]:
    """How many images stand in columns that are not read, by the statistics of the file's row
    groups.
    """
    count, metadata = 0, file.metadata
    places = (
        {metadata.row_group(0).column(n).path_in_schema: n for n in range(metadata.num_columns)}
        if metadata.num_row_groups
        else {}
    )
    for name in other_image_columns(file.schema_arrow, shard, job):
        place = places.get(name, places.get(f"{name}.bytes"))
        for n in (
            range(shard.start, shard.stop or metadata.num_row_groups) if place is not None else ()
        ):
            group = metadata.row_group(n)
            statistics = group.column(place).statistics
            nulls = (
                statistics.null_count if statistics is not None and statistics.has_null_count else 0
            )
            count += group.num_rows - nulls
    return {LeftOut.FURTHER_IMAGE: count} if count else {}


def _rows(
    file: Any, shard: Shard, job: Job, rows: range, wanted: Callable[[int], bool]
) -> Iterator[Encoded]:
    """The wanted rows of a range of the file's. One without bytes whose path may be read has no
    reason yet.
    """
    names = columns_to_read(file.schema_arrow, shard, job)
    for row, batch, positions in read_batches(
        file, names, rows, lambda row: wanted(row - rows.start)
    ):
        images, further = _first_images(batch.column(names[0]))
        passthrough = passthrough_batch(batch, job) if job.keep else None
        keys = key_values(batch, job)
        for n in positions:
            path, data = _path_and_bytes(images[n])
            named = None if keys is None else python_value(keys[n])
            values = with_folder_columns(
                passthrough and PassthroughRow(passthrough, n), shard.url, job
            )
            item = Encoded(
                row + n - rows.start,
                key_of(named, path, row + n),
                shard.url,
                None,
                passthrough=values,
                further_images=further[n],
            )
            yield _with_content(item, data, path, shard, job)


def _first_images(column: pa.Array) -> tuple[pa.Array, list[int]]:
    """A column with one image a row, and how many further ones each row has.

    Of a list the first image counts; a dictionary (a pandas category, a Polars categorical) becomes
    its values.
    """
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode(), [0] * len(column)
    if is_list(column.type):
        rows = [_images_of(row) for row in column]
        firsts = [images[0].as_py() if images else None for images in rows]
        return pa.array(firsts, column.type.value_type), [
            max(0, len(images) - 1) for images in rows
        ]
    return column, [0] * len(column)


def _images_of(row: pa.Scalar) -> list[pa.Scalar]:
    """The images of a list that are there."""
    return [image for image in row.values if image.is_valid] if row.is_valid else []


def _path_and_bytes(cell: pa.Scalar) -> tuple[object, pa.Scalar]:
    """A Hugging Face image is a struct<bytes, path>; a null one has null fields."""
    if not pa.types.is_struct(cell.type):
        return None, cell
    data = cell["bytes"] if "bytes" in cell else pa.scalar(None, pa.binary())
    return python_value(cell["path"]) if "path" in cell else None, data


def _with_content(item: Encoded, data: pa.Scalar, path: object, shard: Shard, job: Job) -> Encoded:
    """With its bytes, with the URL that its path names, or with the reason why there is neither."""
    if pa.types.is_dictionary(data.type):
        data = data.value
    if not data.is_valid and path and job.rules > 1:
        (uri, reason, message), spellings = follow_path(
            path, shard, allowed_prefixes(shard, job), job
        )
        return replace(
            item, uri=uri or shard.url, reason=reason, message=message, spellings=spellings
        )
    if not data.is_valid:
        what = (
            f", only the path {printable(str(path))[:200]}; only bytes inside the file are read"
            if path
            else ""
        )
        return replace(item, reason="missing", message=f"the row holds no image bytes{what}")
    if data.as_buffer().size > MAX_IMAGE_BYTES:
        reason, message = too_large(data.as_buffer().size)
        return replace(item, reason=reason, message=message)
    return replace(item, data=data.as_buffer().to_pybytes())
