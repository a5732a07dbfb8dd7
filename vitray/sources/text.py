"""CSV and JSON lines as tables of text columns."""

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
NO_TEXT = re.compile(rb"[\0-\x08\x0e-\x19]")  # tars, images and archives begin with such bytes
# Lines parsed a second time, because an open quote before them included them. Without a limit, a
# hostile file could make the reader parse each line n times.
LINES_AGAIN = 1_000_000
SAMPLE_LINES = 10_000  # read for the names of columns, because JSON lines may leave fields out
PYTHON_FIELD_CHARS = 131_072  # the csv module's own limit of a field
NOT_UTF8 = "lines that are not UTF-8 were read as Windows-1252"
DELIMITERS = (",", ";", "\t", "|")
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins with the mark of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class UnreadableTextError(ShardError):
    """The file is text, but neither CSV nor JSON lines in UTF-8.

    The job is refused when all files of a source are.
    """


@dataclass(frozen=True, slots=True)
class Dialect:
    """The format of a CSV file.

    skipped: lines before the header, such as Excel's `sep=;`.
    strips: whether spaces after the delimiters are removed from the values.
    decodes: whether lines that are not UTF-8 are read as Windows-1252 (source rules 2).
    """

    delimiter: str = ","
    skipped: int = 0
    strips: bool = False
    decodes: bool = False


def text_format(stream: BinaryIO, shard: Shard) -> str:
    """csv or jsonl, by content and suffix. Afterwards the stream is at its start again.

    Raises UnreadableTextError. For bytes that are not text, raises ShardError where the suffix is
    that of a manifest, SourceError for any other suffix.
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
        what = "is not a manifest (Parquet, CSV or JSONL): its bytes are not UTF-8 text"
        raise error(f"{shard.url} {what}. Correct `source` or `format`, or replace it.")
    like_json = head.lstrip().startswith(b"{") and not name.endswith((".csv", ".tsv"))
    return "jsonl" if like_json or name.endswith((".jsonl", ".ndjson")) else "csv"


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte order mark, or by the zeros between ASCII characters."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    halves = (head[0:64:2], head[1:64:2])
    half_is_zero = any(half.count(0) == len(half) > 0 for half in halves)
    is_text = half_is_zero and not NO_TEXT.search(head.replace(b"\0", b""))
    return "UTF-16" if is_text else None


def dialect_of(stream: BinaryIO, url: str, columns: Sequence[str]) -> Dialect:
    """The format of a CSV, by its header. Afterwards the stream is at its start again.

    The delimiter is the first one with one of `columns` among the names, else the first one that
    gives two names, else a comma.
    """
    lines = _lines(stream, url, carriage_returns=True)
    header = _header_text(next(lines, (0, b""))[1])
    declared = re.fullmatch(r"sep=(.)", header, re.IGNORECASE)
    if declared:
        header = _header_text(next(lines, (0, b""))[1])
    stream.seek(0)
    names = dict[str, list[str]]()
    for delimiter in [declared[1]] if declared else DELIMITERS:
        with suppress(csv.Error, StopIteration):
            names[delimiter] = next(csv.reader([header], delimiter=delimiter))
    delimiter = declared[1] if declared else _likely_delimiter(names, columns)
    strips = any(name != name.strip() for name in names.get(delimiter, []))
    return Dialect(delimiter, 1 if declared else 0, strips, decodes=True)


def _likely_delimiter(names: dict[str, list[str]], columns: Sequence[str]) -> str:
    """names: those in the header, by the delimiter that it is split at."""
    lower = {name.lower() for name in columns}
    for delimiter, fields in names.items():
        if any(field.strip().lower() in lower for field in fields):
            return delimiter
    for delimiter, fields in names.items():
        if len(fields) > 1:
            return delimiter
    return next(iter(names), ",")


def _header_text(line: bytes) -> str:
    return text_of(line)[0].rstrip("\r\n")


def csv_records(
    stream: BinaryIO, url: str, dialect: Dialect, notes: list[str]
) -> Iterator[list[str] | str]:
    """The fields of each record, the header first; for a malformed line, a message.

    After a malformed record only its first line is skipped: the lines that an open quote included
    are parsed again. This is Python's reader, because pyarrow's reads ahead in threads that outlive
    a range.

    Raises ShardError for a malformed header, and after LINES_AGAIN lines were parsed again.
    """
    # This limit applies to the whole process.
    csv.field_size_limit(MAX_LINE_BYTES if dialect.decodes else PYTHON_FIELD_CHARS)
    lines = islice(_lines(stream, url, dialect.decodes), dialect.skipped, None)
    pending = _PendingLines((n, _line_text(n, line, dialect, notes)) for n, line in lines)
    width = 0  # of the header, once it was read
    lines_again = 0
    while True:
        records = csv.reader(
            pending.texts(),
            strict=True,
            delimiter=dialect.delimiter,
            skipinitialspace=dialect.strips,
        )
        try:
            for record in records:
                is_header = not width
                if record and is_header:
                    width = len(record)
                    yield [name.strip() for name in record] if dialect.strips else record
                elif record and len(record) == width:
                    yield record
                elif record:
                    raise csv.Error(f"{len(record)} fields, the header has {width}")
                pending.current.clear()
            return
        except csv.Error as error:
            number, count = pending.return_all_but_first()
            lines_again += count
            message = f"line {number} is not valid CSV ({error})"
            if not width or lines_again > LINES_AGAIN:
                raise ShardError(f"{url}: {message}. Correct or remove the line.") from error
            yield message


class _PendingLines:
    """(number, text) of a file's lines; lines that were read can be returned."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._returned = deque[tuple[int, str]]()
        self.current = list[tuple[int, str]]()  # of the record that is being read

    def texts(self) -> Iterator[str]:
        while line := self._returned.popleft() if self._returned else next(self._lines, None):
            self.current.append(line)
            yield line[1]

    def return_all_but_first(self) -> tuple[int, int]:
        """(number of the record's first line, how many lines follow it and were returned)."""
        (number, _), *following = self.current
        self._returned.extendleft(reversed(following))
        self.current.clear()
        return number, len(following)


def _line_text(number: int, line: bytes, dialect: Dialect, notes: list[str]) -> str:
    if not dialect.decodes:
        return line.decode("utf-8-sig" if number == 1 else "utf-8", "replace")
    text, is_utf8 = text_of(line)
    if not is_utf8 and NOT_UTF8 not in notes:
        notes.append(NOT_UTF8)
    return text


def json_names(stream: BinaryIO, url: str) -> list[str]:
    """The fields of the first objects, in order of appearance.

    Raises UnreadableTextError, and ShardError where no line is an object with fields.
    """
    sample = [line for _, line in islice(json_lines(stream, url), SAMPLE_LINES)]
    names = dict[str, None]()
    for line in sample:
        names |= dict.fromkeys(map(printable, json_object(line) or ()))
    if sample and not names and sample[0].lstrip()[:1] in (b"[", b"{"):
        raise UnreadableTextError(
            f"{url} is one JSON document, not JSON lines. Write one object per line: jq -c '.[]' "
            "for an array."
        )
    if sample and not names:
        raise ShardError(
            f"{url}: none of its first {len(sample):,} lines is a JSON object with fields. Correct "
            "or remove it."
        )
    return list(names)


def json_lines(stream: BinaryIO, url: str) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line that is not empty."""
    return ((number, line) for number, line in _lines(stream, url) if line.strip())


def json_object(line: bytes) -> dict[str, object] | None:
    """The object in a line; None where the line is not one."""
    with suppress(ValueError, RecursionError):
        if isinstance(record := json.loads(line), dict):
            return record
    return None


def json_text(value: object) -> str | None:
    """A value for a text column: text unchanged, everything else as JSON."""
    if value is None:
        return None
    return printable(value) if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _lines(
    stream: BinaryIO, url: str, carriage_returns: bool = False
) -> Iterator[tuple[int, bytes]]:
    """(number, line) of every line. Raises ShardError for a line over MAX_LINE_BYTES.

    carriage_returns: a single carriage return ends a line too, as Excel for the Mac writes it.
    """
    first = stream.readline(MAX_LINE_BYTES + 1)
    has_only_returns = b"\r" in first.rstrip(b"\r\n") and not first.endswith(b"\n")
    if carriage_returns and has_only_returns and len(first) <= MAX_LINE_BYTES:
        yield from enumerate(first.splitlines(keepends=True), 1)
        return
    following = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(chain([first] if first else [], following), 1):
        if len(line) > MAX_LINE_BYTES:
            raise ShardError(
                f"{url}: line {number} is longer than {MAX_LINE_BYTES} bytes. Split or remove it."
            )
        yield number, line
