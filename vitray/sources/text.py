"""CSV and JSON lines as tables of text columns. Private to this package."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import BinaryIO

from vitray.errors import ShardError, SourceError
from vitray.schema import Shard
from vitray.sources.objects import printable, text_of

MAX_LINE_BYTES = 16 << 20
NO_TEXT = re.compile(
    rb"[\0-\x08\x0e-\x19]"
)  # control characters, which any tar, image or archive begins with
# looked at a second time, where an open quote took them along; a hostile file could ask for each of
# them n times
LINES_AGAIN = 1_000_000
SAMPLE_LINES = 10_000  # JSON lines may leave fields out: so many tell the columns
PYTHON_FIELD_CHARS = 131_072  # the csv module's own limit of a field
NOT_UTF8 = "lines that are not UTF-8 were read as Windows-1252"
DELIMITERS = (",", ";", "\t", "|")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class UnreadableTextError(ShardError):
    """The file is text, but neither CSV nor JSON lines in UTF-8. Where all of a source's files are,
    the job is refused.
    """


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a CSV is written. skipped: lines before the header, such as Excel's `sep=;`.

    strips: whether spaces follow its delimiters, which are no part of the values.
    """

    delimiter: str = ","
    skipped: int = 0
    strips: bool = False
    decodes: bool = (
        False  # whether lines that are not UTF-8 are read as Windows-1252: by source rules 2
    )


def text_format(stream: BinaryIO, shard: Shard) -> str:
    """csv or jsonl, by content and suffix. The stream stands at its start again.

    Raises UnreadableTextError, ShardError for a manifest's name with other bytes, SourceError for
    any other name.
    """
    head = stream.read(512)
    stream.seek(0)
    name = shard.url.lower()
    if encoding := _wide_encoding(head):
        raise UnreadableTextError(
            f"{shard.url} is {encoding} text, and vitray reads UTF-8. Convert it: iconv -f "
            f"{encoding} -t UTF-8."
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


def dialect_of(stream: BinaryIO, url: str, columns: Sequence[str]) -> Dialect:
    """How a CSV is written, by its header. The stream stands at its start again.

    The delimiter is the first with one of `columns` among the names, else the first that gives two
    names, else a comma.
    """
    lines = _lines(stream, url, carriage_returns=True)
    header, skipped = _header_text(next(lines, (0, b""))[1]), 0
    if said := re.fullmatch(r"sep=(.)", header, re.IGNORECASE):
        header, skipped = _header_text(next(lines, (0, b""))[1]), 1
    stream.seek(0)
    names = dict[str, list[str]]()
    for delimiter in [said[1]] if said else DELIMITERS:
        with suppress(csv.Error, StopIteration):
            names[delimiter] = next(csv.reader([header], delimiter=delimiter))
    wanted = {name.lower() for name in columns}
    with_column = [
        d for d, fields in names.items() if any(field.strip().lower() in wanted for field in fields)
    ]
    with_several = [d for d, fields in names.items() if len(fields) > 1]
    delimiter = next(iter([*with_column, *with_several, *names]), ",") if not said else said[1]
    strips = any(name != name.strip() for name in names.get(delimiter, []))
    return Dialect(delimiter, skipped, strips, decodes=True)


def _header_text(line: bytes) -> str:
    return text_of(line)[0].rstrip("\r\n")


def csv_records(
    stream: BinaryIO, url: str, dialect: Dialect, notes: list[str]
) -> Iterator[list[str] | str]:
    """The fields of each record, the header first; of a malformed line, what is wrong with it.

    The lines that an open quote took along are looked at again. Python's reader: pyarrow's reads
    ahead in threads that outlive a range.
    """
    csv.field_size_limit(
        MAX_LINE_BYTES if dialect.decodes else PYTHON_FIELD_CHARS
    )  # of this process
    lines = islice(_lines(stream, url, dialect.decodes), dialect.skipped, None)
    numbered = ((n, _line_text(n, line, dialect, notes)) for n, line in lines)
    taken, again = list[tuple[int, str]](), deque[tuple[int, str]]()
    width, left, is_header = 0, LINES_AGAIN, True

    def texts() -> Iterator[str]:
        while line := again.popleft() if again else next(numbered, None):
            taken.append(line)
            yield line[1]

    while True:
        try:
            for record in csv.reader(
                texts(), strict=True, delimiter=dialect.delimiter, skipinitialspace=dialect.strips
            ):
                if record and len(record) != (width := width or len(record)):
                    raise csv.Error(f"{len(record)} fields, the header has {width}")
                if record:
                    yield (
                        [name.strip() for name in record]
                        if dialect.strips and is_header
                        else record
                    )
                    is_header = False
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


def _line_text(number: int, line: bytes, dialect: Dialect, notes: list[str]) -> str:
    if not dialect.decodes:
        return line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
    text, is_utf8 = text_of(line)
    if not is_utf8 and NOT_UTF8 not in notes:
        notes.append(NOT_UTF8)
    return text


def json_names(stream: BinaryIO, url: str) -> list[str]:
    """The fields of the first objects, in the order in which they come."""
    sample = [line for _, line in islice(json_lines(stream, url), SAMPLE_LINES)]
    found = [list(map(printable, json_object(line) or ())) for line in sample]
    names = dict.fromkeys(name for line in found for name in line)
    if found and not names and sample[0].lstrip()[:1] in (b"[", b"{"):
        raise UnreadableTextError(
            f"{url} is one JSON document, not JSON lines. Write one object a line: jq -c '.[]' "
            f"for an array."
        )
    if found and not names:
        raise ShardError(
            f"{url}: none of its first {len(found):,} lines is a JSON object with fields. Correct "
            f"or remove it."
        )
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


def _lines(
    stream: BinaryIO, url: str, carriage_returns: bool = False
) -> Iterator[tuple[int, bytes]]:
    """(number, line). carriage_returns: lines that end in one alone, as Excel for the Mac writes
    them, are lines too.
    """
    first = stream.readline(MAX_LINE_BYTES + 1)
    if (
        carriage_returns
        and b"\r" in first.rstrip(b"\r\n")
        and not first.endswith(b"\n")
        and len(first) <= MAX_LINE_BYTES
    ):
        yield from enumerate(first.splitlines(keepends=True), 1)
        return
    following = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(chain([first] if first else [], following), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ShardError(
                f"{url}: line {number} is longer than {MAX_LINE_BYTES} bytes. Split or remove it."
            )
        yield number, line
