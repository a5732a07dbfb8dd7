"""CSV and JSON lines as tables of text columns. Private to this package."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import BinaryIO

from vitray.errors import ShardError, SourceError
from vitray.schema import Shard
from vitray.sources.objects import printable

MAX_LINE_BYTES = 16 << 20
NO_TEXT = re.compile(rb"[\0-\x08\x0e-\x19]")  # control characters, which any tar, image or archive begins with
# looked at a second time, where an open quote took them along; a hostile file could ask for each of them n times
LINES_AGAIN = 1_000_000
SAMPLE_LINES = 100  # JSON lines may leave fields out: the first hundred tell the columns
DELIMITERS = (",", ";", "\t", "|")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class WrongEncodingError(ShardError):
    """The file is text, but not UTF-8."""


def text_format(stream: BinaryIO, shard: Shard) -> str:
    """csv or jsonl, by content and suffix. The stream stands at its start again.

    Raises WrongEncodingError, ShardError for a manifest's name with other bytes, SourceError for any other name.
    """
    head = stream.read(512)
    stream.seek(0)
    name = shard.url.lower()
    if encoding := _wide_encoding(head):
        raise WrongEncodingError(
            f"{shard.url} is {encoding} text, and vitray reads UTF-8. Convert it: iconv -f {encoding} -t UTF-8."
        )
    if NO_TEXT.search(head):
        error = ShardError if name.endswith(SUFFIXES) else SourceError  # a bad file, or a bad job
        what = "is not a manifest (Parquet, CSV or JSONL): its bytes are no UTF-8 text"
        raise error(f"{shard.url} {what}. Correct `source` or `format`, or replace it.")
    like_json = head.lstrip().startswith(b"{") and not name.endswith((".csv", ".tsv"))
    return "jsonl" if like_json or name.endswith((".jsonl", ".ndjson")) else "csv"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte order mark, or by the zeros between ASCII characters."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    even, odd = head[0:64:2], head[1:64:2]
    half_is_zero = any(half.count(0) == len(half) and half for half in (even, odd))
    is_text = half_is_zero and not NO_TEXT.search(head.replace(b"\0", b""))
    return "UTF-16" if is_text else None


def delimiter_of(stream: BinaryIO, url: str, columns: Sequence[str]) -> str:
    """What separates a CSV's fields, by its header. The stream stands at its start again.

    The first delimiter with one of `columns` among the names, else the first that gives two names, else a comma.
    """
    _, line = next(_lines(stream, url), (0, b""))
    stream.seek(0)
    header = line.decode("utf-8-sig", "replace").rstrip("\r\n")
    names = dict[str, list[str]]()
    for delimiter in DELIMITERS:
        with suppress(csv.Error, StopIteration):
            names[delimiter] = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    with_column = [d for d, found in names.items() if set(found) & set(columns)]
    with_several = [d for d, found in names.items() if len(found) > 1]
    return next(iter([*with_column, *with_several]), ",")


def csv_records(stream: BinaryIO, url: str, delimiter: str = ",") -> Iterator[list[str] | str]:
    """The fields of each record, the header first; of a malformed line, what is wrong with it.

    The lines that an open quote took along are looked at again. Python's reader: pyarrow's reads
    ahead in threads that outlive a range.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # Python's own limit is 131,072 characters
    numbered = ((n, line.decode("utf-8-sig" if n == 1 else "utf-8", "replace")) for n, line in _lines(stream, url))
    taken, again = list[tuple[int, str]](), deque[tuple[int, str]]()
    width, left = 0, LINES_AGAIN

    def texts() -> Iterator[str]:
        while line := again.popleft() if again else next(numbered, None):
            taken.append(line)
            yield line[1]

    while True:
        try:
            for record in csv.reader(texts(), strict=True, delimiter=delimiter):
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


def json_names(stream: BinaryIO, url: str) -> list[str]:
    """The fields of the first objects, in the order in which they come."""
    sample = islice(json_lines(stream, url), SAMPLE_LINES)
    found = [list(map(printable, json_object(line) or ())) for _, line in sample]
    names = dict.fromkeys(name for line in found for name in line)
    if found and not names:
        raise ShardError(f"{url}: none of its first {SAMPLE_LINES} lines is a JSON object with fields. Correct or remove it.")
    return list(names)


def json_lines(stream: BinaryIO, url: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not empty."""
    return ((number, line) for number, line in _lines(stream, url) if line.strip())


def json_object(line: bytes) -> dict[str, object] | None:
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None


def json_text(value: object) -> str | None:
    """A value as a text column has it: text as it is, everything else as JSON."""
    if value is None:
        return None
    return printable(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _lines(stream: BinaryIO, url: str) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ShardError(f"{url}: line {number} is longer than {MAX_LINE_BYTES} bytes. Split or remove it.")
        yield number, line
