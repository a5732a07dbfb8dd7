"""The walk over a tar's headers.

`tarfile` accepts a truncated archive silently, so this walk accounts for every byte up to the
object's size. These are headers with a valid checksum, data, the end marker, and zeros after it.
Member names are never used as paths.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vitray.errors import ShardError, StorageError
from vitray.sources.objects import printable

MAX_EXTENSION_BYTES = 1 << 20  # PAX records or a GNU long name; a real path is under 4 KiB
BLOCK = 512
TAIL_BYTES = 1 << 20
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class TarCutError(Exception):
    """The tar cannot be read from source.start on."""


@dataclass(slots=True)
class TarSource:
    """The bytes of one tar in order, counted against its size, and the state of the walk."""

    stream: BinaryIO
    url: str
    size: int
    at: int = 0
    start: int = 0  # of the current member, with its extended headers
    is_tar: bool = False
    truncated_at: int | None = None
    why: str = ""

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer only at the end of the object. Raises StorageError."""
        data = self.stream.read(count)
        self.at += len(data)
        if len(data) < count and self.at < self.size:
            raise StorageError(
                f"{self.url}: only {self.at} of {self.size} bytes were read. Run the same command "
                "again."
            )
        return data

    def move(self, offset: int) -> None:
        if offset != self.at:
            self.stream.seek(offset)
            self.at = offset

    def restart(self) -> None:
        self.move(0)
        self.start = 0


def members_of(source: TarSource) -> Iterator[tarfile.TarInfo]:
    """Every member in order, with the source at its data.

    Raises TarCutError where the bytes are no longer a valid tar.
    """
    while True:
        source.start = source.at
        records: dict[str, bytes] = {}
        while (info := _header(source)) is not None and info.type in _EXTENSIONS:
            records |= _records(source, info)
        if info is None:
            _check_end(source)
            return
        _complete(info, records)
        data_at = source.at
        if data_at + info.size > source.size:
            remaining = source.size - data_at
            raise TarCutError(
                f"the data of {printable(info.name)!r} are cut: {remaining} of {info.size} bytes"
            )
        yield info
        source.move(min(data_at + _padded(info.size), source.size))


_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)


def _header(source: TarSource) -> tarfile.TarInfo | None:
    """The next header; None for a block of zeros."""
    block = source.take(BLOCK)
    if not block:
        raise TarCutError("the end marker is missing")
    if block.count(0) == BLOCK:
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarCutError(f"damaged header at byte {source.at - len(block)}: {error}") from error
    if info.size < 0:
        raise TarCutError("a header with a negative size")
    source.is_tar = True
    return info


def _records(source: TarSource, info: tarfile.TarInfo) -> dict[str, bytes]:
    """The records of an extended header, which describe the next member."""
    if info.size > MAX_EXTENSION_BYTES:
        raise TarCutError(f"an extended header of {info.size} bytes")
    data = source.take(_padded(info.size))[: info.size]
    if len(data) < info.size:
        raise TarCutError("it ends inside an extended header")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    return _pax_records(data) if info.type in _PAX else {}


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Records `<length> <keyword>=<value>\\n` (POSIX.1-2001, pax)."""
    records = {}
    at = 0
    while at < len(data) and data[at]:
        digits = data[at : at + 10].partition(b" ")[0]
        record = data[at : at + int(digits)] if digits.isdigit() else b""
        keyword, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(digits):
            raise TarCutError("a damaged PAX header")
        records[keyword.decode("utf-8", "replace")] = value
        at += len(record)
    return records


def _complete(info: tarfile.TarInfo, records: dict[str, bytes]) -> None:
    """Set the member's name and size from its extended headers. Raises TarCutError."""
    if "path" in records:
        info.name = records["path"].decode("utf-8", "surrogateescape")
    has_sparse_record = any(keyword.startswith("GNU.sparse") for keyword in records)
    if info.type == tarfile.GNUTYPE_SPARSE or has_sparse_record:
        raise TarCutError(
            f"{printable(info.name)!r} is stored sparse; pack it again without --sparse"
        )
    if "size" in records:
        if not records["size"].isdigit() or len(records["size"]) > 20:
            raise TarCutError("a damaged PAX header")
        info.size = int(records["size"])
    if info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
        info.size = 0  # links, directories and devices have no data, although a header may claim it


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_end(source: TarSource) -> None:
    """Check what follows the first zero block: a second one, then zeros up to the end.

    Raises TarCutError.
    """
    marker = source.at - BLOCK
    if marker != source.start:
        raise TarCutError("an extended header has no member after it")
    while chunk := source.take(TAIL_BYTES):
        source.start = source.at - len(chunk.lstrip(b"\0"))
        if source.start < source.at:
            raise TarCutError("there are bytes after the end marker")
    source.start = source.at
    if source.at - marker < 2 * BLOCK:
        raise TarCutError("the end marker is cut")
    if not source.is_tar and source.size % BLOCK:
        raise TarCutError("zeros only")


def not_a_tar(source: TarSource) -> ShardError:
    """The error for an object that is not a tar, by its first bytes."""
    source.move(0)
    head = source.take(16)
    packed = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
    if packed:
        return ShardError(
            f"{source.url} is {packed}, not a tar. Compressed archives cannot be streamed "
            "exactly: unpack it."
        )
    what = f"it begins with the bytes {head[:8].hex(' ')}" if head else "it is empty"
    return ShardError(f"{source.url} is not a tar: {what}. Replace or remove it, or set `format`.")
