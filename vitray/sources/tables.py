"""Tables: named columns of Parquet, CSV and JSON lines.

Passthrough columns of a Parquet file stay Arrow data: they are sliced from its batches and never
become Python objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.arrow_types import is_list
from vitray.errors import JobError, ShardError, one_line
from vitray.job import Job
from vitray.schema import PassthroughRow, Shard, ShardKind, SourceRules
from vitray.sources.names import folder_value, is_folder_column, kind_of
from vitray.sources.objects import CHUNK_BYTES, open_shard, printable
from vitray.sources.text import (
    Dialect,
    csv_records,
    dialect_of,
    json_lines,
    json_names,
    json_object,
    json_text,
    text_format,
)

IMAGE_NAMES_V1 = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "picture")
IMAGE_NAMES = (
    *IMAGE_NAMES_V1,
    "images",
    "photo",
    "data",
    "binary",
    "image_bytes",
    "img_bytes",
    "image_data",
    "image_content",
    "jpeg_bytes",
    "png_bytes",
    "image_binary",
    "image/encoded",
    "encoded_image",
)
# Columns with these words hold a second, smaller or derived image.
SECONDARY_WORDS = ("thumb", "preview", "icon", "mask", "depth", "segment", "small")
PATH_NAMES_V1 = (
    "path",
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "url",
    "uri",
    "key",
)
PATH_NAMES = (
    "path",
    "file",
    "filename",
    "file_name",
    "image",
    "image_path",
    "img_path",
    "image_file",
    "filepath",
    "file_path",
    "img",
    "url",
    "uri",
    "image_url",
    "image_uri",
    "key",
)
KEY_NAMES = ("__key__", "key", "id")
BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view())
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
# Source rules 1 store these types for any width of the file's offsets.
SAME_VALUES = dict.fromkeys(STRINGS, pa.string()) | dict.fromkeys(BINARIES, pa.binary())
BATCH_ROWS = 32  # bounds the images in memory
MAX_KEY_ROWS = 1_000_000  # read to check that a column's values are unique: 50 MB of text


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row of a manifest: the image's path, key and passthrough values, or a problem."""

    path: object = None
    key: object = None
    passthrough: PassthroughRow | None = None
    problem: str = ""


def read_schema(shard: Shard, job: Job) -> pa.Schema:
    """Column names and types. Columns of CSV and JSON lines are text. Raises ShardError."""
    with open_shard(shard) as stream:
        if _is_parquet(stream, shard):
            with open_parquet(stream, shard.url) as file:
                return file.schema_arrow
        is_csv = text_format(stream, shard) == "csv"
        names = next(_records(stream, shard, job), []) if is_csv else json_names(stream, shard.url)
        return pa.schema([(name, pa.string()) for name in names])


def count_rows(shard: Shard, job: Job) -> int:
    """The number of rows in the whole file. Raises ShardError."""
    with open_shard(shard) as stream:
        if _is_parquet(stream, shard):
            with open_parquet(stream, shard.url) as file:
                return int(file.metadata.num_rows)
        if text_format(stream, shard) == "csv":
            return max(0, sum(1 for _ in _records(stream, shard, job)) - 1)
        return sum(1 for _ in json_lines(stream, shard.url))


def read_rows(shard: Shard, job: Job, rows: range, notes: list[str]) -> Iterator[TableRow]:
    """A range of a manifest's rows, in order. notes: messages about the file are appended to it."""
    with open_shard(shard) as stream:
        if _is_parquet(stream, shard):
            with open_parquet(stream, shard.url) as file:
                yield from _parquet_rows(file, shard, job, rows)
            return
        names = columns_to_read(read_schema(shard, job), shard, job)
        if text_format(stream, shard) == "csv":
            records = _records(stream, shard, job, notes)
            header = next(records)
            for record in islice(records, rows.start, rows.stop):
                if isinstance(record, str):
                    yield TableRow(problem=record)
                else:
                    yield _text_row(dict(zip(header, record)), names, job)
            return
        for number, line in islice(json_lines(stream, shard.url), rows.start, rows.stop):
            fields = json_object(line)
            if fields is None:
                yield TableRow(problem=f"line {number} is not a JSON object")
            else:
                yield _text_row({name: json_text(fields.get(name)) for name in names}, names, job)


def _parquet_rows(file: Any, shard: Shard, job: Job, rows: range) -> Iterator[TableRow]:
    names = columns_to_read(file.schema_arrow, shard, job)
    for _, batch, positions in read_batches(file, names, rows, lambda row: True):
        passthrough = passthrough_batch(batch, job)
        keys = key_values(batch, job)
        for n in positions:
            key = None if keys is None else python_value(keys[n])
            yield TableRow(
                python_value(batch.column(names[0])[n]), key, PassthroughRow(passthrough, n)
            )


def _text_row(fields: dict[str, str | None], names: list[str], job: Job) -> TableRow:
    passthrough = {
        name: pa.array([fields[name]], pa.string()) for name in job.keep if name in fields
    }
    key = fields.get(job.key_column) if job.key_column else None
    path = fields[names[0]]
    return TableRow(
        path.strip() if path and job.rules >= SourceRules.V2 else path,
        key,
        PassthroughRow(_batch_of(passthrough, 1), 0),
    )


@contextmanager
def open_parquet(stream: BinaryIO, url: str) -> Iterator[Any]:
    """The pq.ParquetFile of a stream.

    Raises ShardError for pyarrow's errors about broken bytes. Errors of the storage package pass.
    """
    try:
        # Column chunks are read in pieces, because a row group of images can be gigabytes. Only
        # this thread reads: a thread of pyarrow's pool that still has a Python buffer when the
        # interpreter ends aborts the process.
        yield pq.ParquetFile(
            stream, buffer_size=CHUNK_BYTES, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = one_line(error, 300)
        raise ShardError(
            f"{url} cannot be read: {what}. Replace or remove it, then run again."
        ) from error


def read_batches(
    file: Any, names: list[str], rows: range, is_wanted: Callable[[int], bool]
) -> Iterator[tuple[int, pa.RecordBatch, list[int]]]:
    """(first row's number in the file, batch, wanted positions in it) of a range of rows.

    A row group without a wanted row is not read.
    """
    stop = 0
    for group in range(file.num_row_groups):
        row = stop
        stop += file.metadata.row_group(group).num_rows
        in_group = range(max(row, rows.start), min(stop, rows.stop))
        if not any(map(is_wanted, in_group)):
            continue
        for batch in file.iter_batches(
            batch_size=BATCH_ROWS, row_groups=[group], columns=names, use_threads=False
        ):
            positions = [
                n for n in range(batch.num_rows) if row + n in in_group and is_wanted(row + n)
            ]
            if positions:
                yield row, batch, positions
            row += batch.num_rows
        if row != stop:
            raise pa.ArrowInvalid(f"row group {group} ends at row {row}, its footer says {stop}")


def passthrough_batch(batch: pa.RecordBatch, job: Job) -> pa.RecordBatch:
    """The passthrough columns that a batch has, in the order of job.keep.

    Their types are those of `file_passthrough_schema`.
    """
    columns = {name: batch.column(name) for name in job.keep if name in batch.schema.names}
    return _batch_of(columns, batch.num_rows)


def with_folder_columns(
    passthrough: PassthroughRow | None, url: str, job: Job
) -> PassthroughRow | None:
    """All passthrough values of an image, from its table and from the folders of its URL."""
    if not job.keep:
        return None
    if passthrough is not None and passthrough.batch.num_columns == len(job.keep):
        return passthrough
    columns = dict[str, pa.Array]()
    for name in job.keep:
        if passthrough is not None and name in passthrough.batch.schema.names:
            columns[name] = passthrough.batch.column(name).slice(passthrough.row, 1)
        else:
            columns[name] = pa.array([folder_value(name, url)], pa.string())
    return PassthroughRow(_batch_of(columns, 1), 0)


def _batch_of(columns: dict[str, pa.Array], rows: int) -> pa.RecordBatch:
    if columns:
        return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))


def python_value(scalar: pa.Scalar) -> object:
    """A key or a path as a Python value. Bytes that are not UTF-8 are replaced."""
    if pa.types.is_dictionary(scalar.type):
        scalar = scalar.value
    if pa.types.is_struct(scalar.type):  # an image given only by its path
        scalar = scalar["path"] if "path" in scalar else pa.scalar(None)
    if scalar.is_valid and scalar.type in STRINGS:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    return scalar.as_py()


def key_of(key: object, path: object, row: int) -> str:
    """The row's key: of its key column, else the path of its image, else its number in the file."""
    value = next(value for value in (key, path, row) if value is not None and value != "")
    if isinstance(value, bytes):
        return printable(value.decode("utf-8", "surrogateescape"))
    return printable(str(value))


def columns_to_read(schema: pa.Schema, shard: Shard, job: Job) -> list[str]:
    """The columns to read: first that of the images (in a manifest: of their paths), then others.

    Raises JobError for a column that does not exist, and where several could be the image column.
    """
    _require(schema, shard, job, "the input")
    likely = likely_columns(schema, shard.kind, job)
    if not likely:
        raise _no_image_column(schema, shard, job)
    if len(likely) > 1:
        raise JobError(
            f"the input has several columns that could hold the images: {', '.join(likely)}. Set "
            "`image_column`."
        )
    if job.key_column in schema.names and pa.types.is_nested(schema.field(job.key_column).type):
        raise JobError(
            f"key_column: `{job.key_column}` is {schema.field(job.key_column).type}; choose a "
            "column of text or numbers."
        )
    further = [name for name in (job.key_column, *job.keep) if name and name in schema.names]
    return list(dict.fromkeys(likely + further))


def _no_image_column(schema: pa.Schema, shard: Shard, job: Job) -> JobError:
    names_a_file = any(kind_of(name, job.rules) == ShardKind.FILES for name in schema.names)
    if shard.kind == ShardKind.MANIFEST and names_a_file:
        return JobError(
            f"{shard.url} has no header: its first line is {', '.join(schema.names)[:200]}. Add a "
            "line with the column names, like `path`."
        )
    if shard.kind == ShardKind.PARQUET:
        what = "column with image bytes (binary, or a struct with `bytes`)"
    else:
        what = f"string column of paths ({', '.join(PATH_NAMES)})"
    if job.image_column:
        what += f" named `{job.image_column}`"
    if doubled := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        named = ", ".join(f"`{name}`" for name in doubled)
        return JobError(f"{shard.url} has several columns of one name: {named}. Rename them.")
    columns = ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:20])
    return JobError(f"the input has no {what}; it has {columns}. Set `image_column`.")


def parquet_kind(schema: pa.Schema, job: Job) -> ShardKind | None:
    """PARQUET for a file with images, MANIFEST for one with their paths, None for neither.

    A column of paths with a usual name is preferred to a thumbnail.

    Raises JobError where either could be meant.
    """
    images = likely_columns(schema, ShardKind.PARQUET, job)
    paths = likely_columns(schema, ShardKind.MANIFEST, job)
    if job.rules == SourceRules.V1 or not (images and paths) or job.image_column:
        if images:
            return ShardKind.PARQUET
        return ShardKind.MANIFEST if paths else None
    if any(name.lower() in IMAGE_NAMES for name in images) or paths == ["key"]:
        return ShardKind.PARQUET
    if all(_is_secondary(name) for name in images):
        return ShardKind.MANIFEST
    names = ", ".join(f"`{name}`" for name in images)
    raise JobError(
        f"the input has images in {names} and paths in `{paths[0]}`. "
        "Set `image_column` to the one that you mean."
    )


def likely_columns(schema: pa.Schema, kind: ShardKind, job: Job) -> list[str]:
    """The columns that could hold the images (PARQUET) or their paths (MANIFEST).

    It is the job's `image_column`, or one by type and usual names; several where it is not clear.
    """
    unique = [field for field in schema if schema.get_field_index(field.name) >= 0]
    if kind == ShardKind.PARQUET:
        fitting = [field.name for field in unique if _holds_images(field, job)]
    else:
        fitting = [field.name for field in unique if _holds_paths(field.type, job)]
    if job.image_column:
        return [name for name in fitting if name == job.image_column]
    if kind == ShardKind.PARQUET:
        return _by_image_names(fitting, job)
    if job.rules == SourceRules.V1:
        return [name for name in PATH_NAMES_V1 if name in fitting][:1]
    by_lower = {name.lower(): name for name in reversed(fitting)}
    return [by_lower[name] for name in PATH_NAMES if name in by_lower][:1]


def _by_image_names(columns: list[str], job: Job) -> list[str]:
    """Columns with a usual name; else those without a word such as `thumb`; else all."""
    usual = IMAGE_NAMES_V1 if job.rules == SourceRules.V1 else IMAGE_NAMES
    by_name = [name for name in columns if name.lower() in usual]
    if job.rules >= SourceRules.V2 and len(by_name) > 1:
        # Of `image` and `data`, take `image`: the names of source rules 1 are unambiguous.
        by_name = [name for name in by_name if name.lower() in IMAGE_NAMES_V1] or by_name
    if by_name or job.rules == SourceRules.V1:
        return by_name or columns
    return [name for name in columns if not _is_secondary(name)] or columns


def other_image_columns(schema: pa.Schema, shard: Shard, job: Job) -> list[str]:
    """Columns that hold images too, by type and name, but are not read."""
    columns_read = columns_to_read(schema, shard, job)
    fitting = [
        field
        for field in schema
        if schema.get_field_index(field.name) >= 0 and _holds_images(field, job)
    ]
    # Without `image_column`, several columns named like images would have been refused.
    is_explicit = job.image_column is not None
    return [
        field.name
        for field in fitting
        if field.name not in columns_read and (is_explicit or _is_named_like_an_image(field))
    ]


def _is_named_like_an_image(field: pa.Field) -> bool:
    words = (*SECONDARY_WORDS, "image", "img", "photo", "picture", "jpg", "jpeg", "png")
    return pa.types.is_struct(field.type) or any(word in field.name.lower() for word in words)


def _is_secondary(name: str) -> bool:
    return any(word in name.lower() for word in SECONDARY_WORDS)


def file_passthrough_schema(shard: Shard, job: Job) -> pa.Schema:
    """The passthrough columns' types in this file, in the order of job.keep."""
    schema = read_schema(shard, job)
    _require(schema, shard, job, shard.url)
    types = [schema.field(name).type if name in schema.names else pa.string() for name in job.keep]
    if (
        job.rules == SourceRules.V1
    ):  # remove what differs between files: dictionary indices, width of offsets
        types = [SAME_VALUES.get(_values_of(kind), _values_of(kind)) for kind in types]
    return pa.schema(list(zip(job.keep, types)))


def find_key_column(shard: Shard, job: Job) -> str | None:
    """The key column of this Parquet file: called __key__, key or id, unique text or integers.

    None where images have paths: these are the keys then. Raises ShardError, JobError.
    """
    with open_shard(shard) as stream, open_parquet(stream, shard.url) as file:
        image = columns_to_read(file.schema_arrow, shard, job)[0]
        if _has_paths(file, file.schema_arrow.field(image).type, image):
            return None
        for name in KEY_NAMES:
            index = file.schema_arrow.get_field_index(name)
            if index < 0 or name == image:
                continue
            if _is_unique_key(file, file.schema_arrow.field(index).type, name):
                return name
    return None


def _has_paths(file: Any, kind: pa.DataType, name: str) -> bool:
    """Whether an image of the first row group has a path."""
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0 or not file.num_row_groups:
        return False
    table = file.read_row_group(0, columns=[f"{name}.path"], use_threads=False)
    structs = table[name].combine_chunks()
    return bool(len(structs) > structs.field("path").null_count)


def _is_unique_key(file: Any, kind: pa.DataType, name: str) -> bool:
    values = _values_of(kind)
    if not (pa.types.is_integer(values) or values in STRINGS):
        return False
    if file.metadata.num_rows > MAX_KEY_ROWS:
        return False
    column = file.read(columns=[name], use_threads=False)[name].cast(values)
    if values == pa.string_view():
        column = column.cast(pa.string())
    return bool(len(column) and not column.null_count and len(column.unique()) == len(column))


def _require(schema: pa.Schema, shard: Shard, job: Job, what: str) -> None:
    """Raise JobError for a column that the file has twice, or that it and its folders lack."""
    for name in [job.key_column, *job.keep]:
        if name is None or schema.get_field_index(name) >= 0:
            continue
        if name == job.key_column and job.key_is_found:
            continue
        if schema.names.count(name) > 1:
            raise JobError(f"{what} has {schema.names.count(name)} columns `{name}`: rename them.")
        if name not in job.keep or not is_folder_column(name, shard.url):
            raise JobError(f"{what} has no column `{name}`; it has {', '.join(schema.names[:20])}")


def key_values(batch: pa.RecordBatch, job: Job) -> pa.Array | None:
    """The key column of a batch; None where keys come from elsewhere."""
    return batch.column(job.key_column) if job.key_column in batch.schema.names else None


def _holds_images(field: pa.Field, job: Job) -> bool:
    """Whether it is a column of bytes, or of structs with `bytes`.

    By source rules 2 also of lists of these, and of structs with nothing but a path.
    """
    kind = field.type
    if job.rules == SourceRules.V1:
        return _holds_bytes(kind)
    if is_list(kind):
        kind = kind.value_type
    is_named = field.name == job.image_column or field.name.lower() in IMAGE_NAMES
    return _holds_bytes(_values_of(kind)) or (is_named and _holds_only_paths(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        n = kind.get_field_index("bytes")
        return n >= 0 and _values_of(kind.field(n).type) in BINARIES
    return kind in BINARIES


def _holds_only_paths(kind: pa.DataType) -> bool:
    """Whether it is a struct with `path` and without `bytes`."""
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") >= 0:
        return False
    n = kind.get_field_index("path")
    return bool(n >= 0 and _values_of(kind.field(n).type) in STRINGS)


def _holds_paths(kind: pa.DataType, job: Job) -> bool:
    return (kind if job.rules == SourceRules.V1 else _values_of(kind)) in STRINGS


def _values_of(kind: pa.DataType) -> pa.DataType:
    """The value type of a dictionary, which pandas' and Polars' categories are stored as."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_parquet(stream: BinaryIO, shard: Shard) -> bool:
    """By kind, content or suffix. Afterwards the stream is at its start again."""
    head = stream.read(4)
    stream.seek(0)
    has_suffix = shard.url.lower().endswith(".parquet")
    return shard.kind == ShardKind.PARQUET or head == b"PAR1" or has_suffix


def _records(
    stream: BinaryIO, shard: Shard, job: Job, notes: list[str] | None = None
) -> Iterator[list[str] | str]:
    path_names = [job.image_column] if job.image_column else list(PATH_NAMES)
    dialect = (
        Dialect() if job.rules == SourceRules.V1 else dialect_of(stream, shard.url, path_names)
    )
    return csv_records(stream, shard.url, dialect, [] if notes is None else notes)
