"""Tables: named columns of a Parquet file, CSV (every column text) or JSON lines (likewise). Private to this room."""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.errors import JobError, ShardError, SourceError
from vitray.job import Job
from vitray.schema import Shard
from vitray.sources.objects import CHUNK_BYTES, open_shard, printable

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "picture")
PATH_NAMES = ("path", "file", "filename", "file_name", "image", "image_path", "url", "uri", "key")
BINARIES = (pa.binary(), pa.large_binary(), pa.binary_view())
STRINGS = (pa.string(), pa.large_string(), pa.string_view())
SAME_VALUES = dict.fromkeys(STRINGS, pa.string()) | dict.fromkeys(BINARIES, pa.binary())
MAX_LINE_BYTES = 16 << 20
NO_TEXT = re.compile(rb"[\0-\x08\x0e-\x19]")  # control characters, which any tar, image or archive begins with
Cells = dict[str, pa.Scalar]  # of one row, by column
BATCH_ROWS = 32  # images are held by so many
# looked at a second time, where an open quote took them along; a hostile file could ask for each of them n times
LINES_AGAIN = 1_000_000
SAMPLE_LINES = 100  # JSON lines may leave fields out: the first hundred tell the columns


def read_schema(shard: Shard) -> pa.Schema:
    """Column names and types. Raises ShardError."""
    with open_shard(shard) as stream:
        kind = _kind(stream, shard)
        if kind == "parquet":
            with open_parquet(stream, shard.url) as file:
                return file.schema_arrow
        names = next(_csv_records(stream, shard.url), []) if kind == "csv" else _json_names(stream, shard.url)
        return pa.schema([(name, pa.string()) for name in names])


def count_rows(shard: Shard) -> int:
    with open_shard(shard) as stream:
        kind = _kind(stream, shard)
        if kind == "parquet":
            with open_parquet(stream, shard.url) as file:
                return int(file.metadata.num_rows)
        if kind == "csv":
            return max(0, sum(1 for _ in _csv_records(stream, shard.url)) - 1)
        return sum(1 for _ in _json_lines(stream, shard.url))


def read_rows(shard: Shard, names: list[str], rows: range) -> Iterator[dict[str, object] | str]:
    """The named columns of a range of rows; of a line that is none, what is wrong with it."""
    with open_shard(shard) as stream:
        kind = _kind(stream, shard)
        if kind == "parquet":
            with open_parquet(stream, shard.url) as file:
                for _, cells in read_cells(file, names, rows, lambda row: True):
                    yield {name: python_value(cell) for name, cell in cells.items()}
        elif kind == "csv":
            records = _csv_records(stream, shard.url)
            header = next(records)
            for record in islice(records, rows.start, rows.stop):
                yield record if isinstance(record, str) else dict(zip(header, record))
        else:
            for number, line in islice(_json_lines(stream, shard.url), rows.start, rows.stop):
                fields = _json_object(line)
                why = f"line {number} is not a JSON object"
                yield why if fields is None else {name: _text(fields.get(name)) for name in names}


@contextmanager
def open_parquet(stream: BinaryIO, url: str) -> Iterator[Any]:
    """The pq.ParquetFile; what pyarrow says of broken bytes comes as ShardError, and storage's own errors pass."""
    try:
        # column chunks are read in pieces, because a row group of images can be gigabytes; and by this thread alone, because
        # one of pyarrow's pool that still holds a Python buffer when the interpreter ends aborts the process
        yield pq.ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ShardError(f"{url} cannot be read: {what}. Replace or remove it, then run again.") from error


def read_cells(file: Any, names: list[str], rows: range, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Cells]]:
    """(row of the file, its cells) of the wanted rows of a range. A row group without one is not read."""
    stop = 0
    for group in range(file.num_row_groups):
        row, stop = stop, stop + file.metadata.row_group(group).num_rows
        here = range(max(row, rows.start), min(stop, rows.stop))
        if not any(map(wanted, here)):
            continue
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group], columns=names, use_threads=False):
            for n in range(batch.num_rows):
                if row + n in here and wanted(row + n):
                    yield row + n, {name: batch.column(name)[n] for name in names}
            row += batch.num_rows
        if row != stop:
            raise pa.ArrowInvalid(f"row group {group} ends at row {row}, its footer says {stop}")


def python_value(scalar: pa.Scalar) -> object:
    """A value as Python has it; text that is not UTF-8 loses those bytes, not the row."""
    if scalar.is_valid and scalar.type in STRINGS:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    return scalar.as_py()


def key_of(named: object, path: object, row: int) -> str:
    """A sample's own name: what its key column says, else the path of its image, else its row in the file."""
    value = next(value for value in (named, path, row) if value is not None and value != "")
    return printable(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value))


def columns_to_read(schema: pa.Schema, kind: str, job: Job) -> list[str]:
    """The job's columns; the first holds the images of a Parquet file, or their paths in a manifest.

    Raises JobError for a column that is not there, and for images that could be in several.
    """
    _require(schema, [job.key_column, *job.keep])
    likely = likely_columns(schema, kind, job)
    if len(likely) == 1:
        return [column for column in dict.fromkeys([*likely, job.key_column, *job.keep]) if column]
    if likely:
        raise JobError(f"the input has several columns that could hold the images: {', '.join(likely)}. Set `image_column`.")
    paths = f"string column of paths ({', '.join(PATH_NAMES)})"
    what = "column with image bytes (binary, or a struct with `bytes`)" if kind == "parquet" else paths
    has = ", ".join(f"{field.name}: {field.type}" for field in list(schema)[:20])
    named = f" named `{job.image_column}`" if job.image_column else ""
    raise JobError(f"the input has no {what}{named}; it has {has}. Set `image_column`.")


def likely_columns(schema: pa.Schema, kind: str, job: Job) -> list[str]:
    """Where the images, or their paths in a manifest, are: as the job says, or by type and usual names. Several: who knows."""
    unique = [field for field in schema if schema.get_field_index(field.name) >= 0]
    fitting = [f.name for f in unique if (_holds_bytes(f.type) if kind == "parquet" else f.type in STRINGS)]
    if job.image_column:
        return [name for name in fitting if name == job.image_column]
    if kind == "parquet":
        return [name for name in fitting if name.lower() in IMAGE_NAMES] or fitting
    return [name for name in PATH_NAMES if name in fitting][:1]


def kept_schema(shard: Shard, job: Job) -> pa.Schema:
    """The kept columns' types, without what differs from file to file: dictionaries' indices, the width of offsets."""
    schema = read_schema(shard)
    _require(schema, job.keep, shard.url)
    kinds = [schema.field(name).type for name in job.keep]
    values = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    return pa.schema([(name, SAME_VALUES.get(kind, kind)) for name, kind in zip(job.keep, values)])


def _require(schema: pa.Schema, names: Sequence[str | None], what: str = "the input") -> None:
    for name in names:
        if name is not None and schema.get_field_index(name) < 0:
            raise JobError(f"{what} has no column `{name}`; it has {', '.join(schema.names[:20])}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        n = kind.get_field_index("bytes")
        return n >= 0 and kind.field(n).type in BINARIES
    return kind in BINARIES


def _kind(stream: BinaryIO, shard: Shard) -> str:
    """By content or suffix. The stream stands at its start again."""
    head = stream.read(512)
    stream.seek(0)
    name = shard.url.lower()
    if shard.kind == "parquet" or head.startswith(b"PAR1") or name.endswith(".parquet"):
        return "parquet"
    if NO_TEXT.search(head):
        error = ShardError if name.endswith((".csv", ".jsonl", ".ndjson")) else SourceError  # a bad file, or a bad job
        what = "is not a manifest (Parquet, CSV or JSONL): its bytes are no UTF-8 text"
        raise error(f"{shard.url} {what}. Correct `source` or `format`, or replace it.")
    like_json = head.lstrip().startswith(b"{") and not name.endswith(".csv")
    return "jsonl" if like_json or name.endswith((".jsonl", ".ndjson")) else "csv"


def _csv_records(stream: BinaryIO, url: str) -> Iterator[list[str] | str]:
    """The fields of each record, the header first; for a line that is none, what is wrong with it, and the lines that it took along
    are looked at again. Python's reader: pyarrow's reads ahead in threads that outlive a range.
    """
    numbered = ((n, line.decode("utf-8-sig" if n == 1 else "utf-8", "replace")) for n, line in _lines(stream, url))
    taken, again = list[tuple[int, str]](), deque[tuple[int, str]]()
    width, left = 0, LINES_AGAIN

    def texts() -> Iterator[str]:
        while line := again.popleft() if again else next(numbered, None):
            taken.append(line)
            yield line[1]

    while True:
        try:
            for record in csv.reader(texts(), strict=True):
                if record and len(record) != (width := width or len(record)):
                    raise csv.Error(f"{len(record)} fields, the header has {width}")
                if record:
                    yield record
                taken.clear()
            return
        except csv.Error as error:
            (number, _), *more = taken
            left -= len(more)
            why = f"line {number} is not valid CSV ({error})"
            if not width or left < 0:
                raise ShardError(f"{url}: {why}. Correct or remove the line.") from error
            yield why
        again.extendleft(reversed(more))
        taken.clear()


def _json_names(stream: BinaryIO, url: str) -> list[str]:
    found = [list(map(printable, _json_object(line) or ())) for _, line in islice(_json_lines(stream, url), SAMPLE_LINES)]
    names = dict.fromkeys(name for line in found for name in line)
    if found and not names:
        raise ShardError(f"{url}: none of its first {SAMPLE_LINES} lines is a JSON object with fields. Correct or remove it.")
    return list(names)


def _json_lines(stream: BinaryIO, url: str) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in _lines(stream, url) if line.strip())


def _json_object(line: bytes) -> dict[str, object] | None:
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None


def _text(value: object) -> str | None:
    if value is None:
        return None
    return printable(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _lines(stream: BinaryIO, url: str) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ShardError(f"{url}: line {number} is longer than {MAX_LINE_BYTES} bytes. Split or remove it.")
        yield number, line
