"""Tars as WebDataset writes them: members with one key are one sample, and every sample is one row.

An own walk over the headers, because `tarfile` accepts a cut archive silently. Every byte is accounted for: headers with
a valid checksum, data, the end marker and zeros after it, up to the object's size. What is not gives a verdict
(End.truncated_at), and the rows before it survive. Names are keys and never paths.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO

import pyarrow as pa

from vitray.errors import ShardError, StorageError
from vitray.job import Job
from vitray.schema import IMAGE_EXTENSIONS, Encoded, End, Shard
from vitray.sources.objects import MAX_IMAGE_BYTES, open_shard, printable, too_large

TEXT_EXTENSIONS = frozenset(("txt", "json", "cls", "caption", "url", "csv", "html", "md", "label"))
MAX_KEPT_BYTES = 16 << 20
MAX_EXTENSION_BYTES = 1 << 20  # PAX records or a GNU long name; a real path is under 4 KiB
START_BYTES = 64 << 20  # what is walked of a tar to tell what is in it: eight GETs of the storage room
BLOCK = 512
TAIL_BYTES = 1 << 20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


def read_tar(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The samples of a tar in order, then its End. Raises ShardError when it is no tar at all."""
    total = 0
    with open_shard(shard) as stream:
        source = _Source(stream, shard.url, shard.size)
        for sample in _samples(source, job, wanted):
            total += 1
            source.skipped["further images of samples were not used (`image_member` chooses)"] += max(0, sample.images - 1)
            if sample.wanted:
                yield sample.row(shard.url, job)
    notes = [source.why, *(f"{count} {what}" for what, count in source.skipped.items() if count)]
    yield End(total, source.truncated_at, "; ".join(filter(None, notes)))


def kept_schema(shard: Shard, job: Job) -> pa.Schema:
    return pa.schema([(name, pa.string() if _is_text(_extension(name)) else pa.binary()) for name in job.keep])


def count_samples(shard: Shard, job: Job) -> tuple[int, int, set[str]]:
    """(samples, bytes walked, extensions) of the start of a tar; walked equals the shard's size when it was all."""
    count, extensions = 0, set[str]()
    with open_shard(shard) as stream:
        source = _Source(stream, shard.url, shard.size)
        for sample in _samples(source, job, lambda index: False):
            count += 1
            extensions |= sample.extensions.keys()
            if source.at >= START_BYTES:
                return count, source.at, extensions
    return count, shard.size, extensions


def absent_members(shard: Shard, job: Job) -> list[str]:
    """The kept extensions that no sample at the start of a tar has; none for an empty tar and for other kinds.

    Raises ShardError when the tar cannot be read, ObjectChanged, StorageError.
    """
    if shard.kind != "tar" or not job.keep:
        return []
    samples, _, extensions = count_samples(shard, job)
    return [name for name in map(_extension, job.keep) if samples and name not in extensions]


class _Cut(Exception):
    """From source.start on the tar cannot be read."""


@dataclass(slots=True)
class _Source:
    """The bytes of one tar in order, counted against its size, and what the walk over them found."""

    stream: BinaryIO
    url: str
    size: int
    at: int = 0
    start: int = 0  # of the member at hand, with its extended headers
    is_tar: bool = False
    skipped: Counter[str] = field(default_factory=Counter)  # how many of what, for the End's note
    truncated_at: int | None = None
    why: str = ""

    def take(self, count: int) -> bytes:
        """So many bytes, fewer only where the object ends."""
        data = self.stream.read(count)
        self.at += len(data)
        if len(data) < count and self.at < self.size:
            raise StorageError(f"{self.url}: {self.at} of {self.size} bytes came. Run the same command again.")
        return data

    def move(self, offset: int) -> None:
        if offset != self.at:
            self.stream.seek(offset)
            self.at = offset


@dataclass(slots=True)
class _Sample:
    index: int
    key: str
    start: int
    wanted: bool
    kept: list[object]
    extensions: dict[str, None] = field(default_factory=dict)  # in order
    images: int = 0
    data: bytes | None = None
    reason: str | None = None
    message: str = ""

    def add(self, extension: str, member: tarfile.TarInfo, source: _Source, job: Job) -> None:
        """Take what the row needs of a member: the image and kept text, nothing else is read."""
        size = member.size
        self.extensions[extension] = None
        picked = _is_image(extension, job) and self.images == 0
        self.images += _is_image(extension, job)
        places = [n for n, name in enumerate(job.keep) if _extension(name) == extension and size <= MAX_KEPT_BYTES]
        if picked and size > MAX_IMAGE_BYTES:
            self.reason, self.message = too_large(size)
        elif not member.isreg():
            if picked:
                self.reason, self.message = "missing", f"a link to {printable(member.linkname)[:200]}, which is not followed"
        elif self.wanted and (picked or places):
            data = source.take(size)
            self.data = data if picked else self.data
            for n in places:
                self.kept[n] = data.decode("utf-8", "replace") if _is_text(extension) else data

    def row(self, uri: str, job: Job) -> Encoded:
        if not self.images:
            what = f".{_extension(job.image_member)}" if job.image_member else "image"
            has = printable(", ".join(islice(self.extensions, 8)))[:200]
            self.reason, self.message = "missing", f"the sample has no {what} member: it has {has}"
        return Encoded(self.index, printable(self.key), uri, self.data, self.reason, self.message, tuple(self.kept))


def _samples(source: _Source, job: Job, wanted: Callable[[int], bool]) -> Iterator[_Sample]:
    """Consecutive members with one key. A cut is noted in the source; the last sample survives when its image is whole."""
    sample: _Sample | None = None
    try:
        for member in _members(source):
            key, extension = _split(member.name)
            is_link = member.islnk() or member.issym()
            if not (member.isreg() or (is_link and _is_image(extension, job))) or not extension:
                if not member.isdir():
                    source.skipped[_why_skipped(member)] += 1
                continue
            # the same extension again is another image of the same name, not a part of this sample
            if sample is None or sample.key != key or extension in sample.extensions:
                if sample is not None:
                    yield sample
                index = sample.index + 1 if sample else 0
                sample = _Sample(index, key, source.start, wanted(index), [None] * len(job.keep))
            sample.add(extension, member, source, job)
    except _Cut as cut:
        if not source.is_tar:
            raise _not_a_tar(source) from None
        source.truncated_at, source.why = source.start, str(cut)
        if sample is not None and not sample.images:
            # its image may lie beyond the cut: the verdict accounts for it, not an error row
            source.truncated_at, sample = sample.start, None
    if sample is not None:
        yield sample


def _why_skipped(member: tarfile.TarInfo) -> str:
    if member.isreg():
        return "members that are hidden or have no extension were skipped"
    return "links were not followed" if member.islnk() or member.issym() else "special files were skipped"


def _split(path: str) -> tuple[str, str]:
    """(key, lower-case extension); no extension for hidden files and names without a dot."""
    folder, slash, name = path.rpartition("/")
    stem, _, extension = name.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _extension(name: str) -> str:
    return name.lower().lstrip(".")


def _is_image(extension: str, job: Job) -> bool:
    if job.image_member:
        return extension == _extension(job.image_member)
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _is_text(extension: str) -> bool:
    return extension.rpartition(".")[2] in TEXT_EXTENSIONS


def _members(source: _Source) -> Iterator[tarfile.TarInfo]:
    """Every member in order, the source at its data. Raises _Cut where the bytes stop being a tar."""
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
            there = source.size - data_at
            raise _Cut(f"the data of {printable(info.name)!r} are cut: {there} of {info.size} bytes")
        yield info
        source.move(min(data_at + _padded(info.size), source.size))


_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)


def _header(source: _Source) -> tarfile.TarInfo | None:
    """The next header; None for a block of zeros."""
    block = source.take(BLOCK)
    if not block:
        raise _Cut("the end marker is missing")
    if block.count(0) == BLOCK:
        return None
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise _Cut(f"damaged header at byte {source.at - len(block)}: {error}") from error
    if info.size < 0:
        raise _Cut("a header with a negative size")
    source.is_tar = True
    return info


def _records(source: _Source, info: tarfile.TarInfo) -> dict[str, bytes]:
    """What an extended header says of the member that follows."""
    if info.size > MAX_EXTENSION_BYTES:
        raise _Cut(f"an extended header of {info.size} bytes")
    data = source.take(_padded(info.size))[: info.size]
    if len(data) < info.size:
        raise _Cut("it ends inside an extended header")
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    return _pax_records(data) if info.type in _PAX else {}


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Records `<length> <keyword>=<value>\\n` (POSIX.1-2001, pax)."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        digits = data[at : at + 10].partition(b" ")[0]
        record = data[at : at + int(digits)] if digits.isdigit() else b""
        keyword, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != int(digits):
            raise _Cut("a damaged PAX header")
        records[keyword.decode("utf-8", "replace")] = value
        at += len(record)
    return records


def _complete(info: tarfile.TarInfo, records: dict[str, bytes]) -> None:
    """Give a member the name and the size that its extended headers say."""
    if "path" in records:
        info.name = records["path"].decode("utf-8", "surrogateescape")
    if info.type == tarfile.GNUTYPE_SPARSE or any(keyword.startswith("GNU.sparse") for keyword in records):
        raise _Cut(f"{printable(info.name)!r} is stored sparse; pack it again without --sparse")
    if "size" in records:
        if not records["size"].isdigit() or len(records["size"]) > 20:
            raise _Cut("a damaged PAX header")
        info.size = int(records["size"])
    if info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
        info.size = 0  # links, directories and devices have no data, whatever their header says


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_end(source: _Source) -> None:
    """After one zero block: a second one, then nothing but zeros up to the object's size."""
    marker = source.at - BLOCK
    if marker != source.start:
        raise _Cut("an extended header stands before no member")
    while chunk := source.take(TAIL_BYTES):
        source.start = source.at - len(chunk.lstrip(b"\0"))
        if source.start < source.at:
            raise _Cut("there are bytes after the end marker")
    source.start = source.at
    if source.at - marker < 2 * BLOCK:
        raise _Cut("the end marker is cut")
    if not source.is_tar and source.size % BLOCK:
        raise _Cut("zeros only")


def _not_a_tar(source: _Source) -> ShardError:
    source.move(0)
    head = source.take(16)
    packed = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)
    if packed:
        return ShardError(f"{source.url} is {packed}, not a tar. Compressed archives cannot be streamed exactly: unpack it.")
    what = f"it begins with {head!r}" if head else "it is empty"
    return ShardError(f"{source.url} is not a tar: {what}. Replace or remove it, or set `format`.")
