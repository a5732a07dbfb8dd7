"""Objects of a source: shard ids, bytes at the planned version, many objects read in order."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import BinaryIO

from vitray import storage
from vitray.errors import ObjectChanged, ObjectMissing, ObjectRefused, ShardError
from vitray.schema import Encoded, Reason, Shard, ShardKind, short_hash
from vitray.storage import ObjectInfo

MAX_IMAGE_BYTES = 256 << 20  # more than 50 MP (job.max_pixels) take as uncompressed 8-bit RGB
READERS = 16  # objects in flight: hides a store's latency, and bounds the images in memory
CHUNK_BYTES = 8 << 20  # one ranged GET of the storage package


def whole_shard(info: ObjectInfo, kind: ShardKind) -> Shard:
    """One object as one shard."""
    return Shard(
        shard_id(_stem_of(info.url), info.url, info.version),
        kind,
        info.url,
        info.size,
        info.version,
        modified=info.modified,
    )


def part_of(shard: Shard, unit: str, rows: int, size: int, span: tuple[int, int]) -> Shard:
    """A part of a shard's object, from span[0] to span[1]. unit: of the span; part of the id."""
    start, stop = span
    name = shard_id(f"{_stem_of(shard.url)}-{unit}{start}-{stop}", shard.url, shard.version)
    return replace(shard, id=name, size=size, start=start, stop=stop, rows=rows)


def shard_id(stem: str, base: str, version: str) -> str:
    return f"{stem}-{short_hash(base)}-{short_hash(version, 8)}"


def printable(text: str) -> str:
    """Valid UTF-8: lone surrogates (undecodable bytes, broken JSON) become visible escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def text_of(data: bytes) -> tuple[str, bool]:
    """(text, whether it is UTF-8). Other bytes are read as Windows-1252, as Excel writes it."""
    try:
        return data.decode("utf-8-sig"), True
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace"), False


def open_shard(shard: Shard) -> BinaryIO:
    """The shard's object at the planned version.

    Raises ObjectChanged, and ShardError when the object does not exist any more.
    """
    try:
        return storage.store_for(shard.url).open(shard.url, shard.version)
    except ObjectMissing as error:
        raise ShardError(
            f"{shard.url} was listed and does not exist any more. Run again: the source is listed "
            "again."
        ) from error


def too_large(size: int) -> tuple[Reason, str]:
    """Reason and message of an image beyond the cap."""
    return (
        Reason.TOO_LARGE,
        f"at least {size} encoded bytes; the cap of one image is {MAX_IMAGE_BYTES}",
    )


class _RefusedRow(Encoded):
    """A row whose object the store refuses to read."""

    __slots__ = ()


def read_in_order(
    rows: Iterable[Encoded],
    is_wanted: Callable[[int], bool],
    version_of: Callable[[int], str | None],
) -> Iterator[Encoded]:
    """The wanted rows in order. A row without a reason gets the bytes of the object at its uri.

    version_of: the version of a row's object, by the row's index; None reads the current one.
    At most READERS images are in memory.

    Raises ObjectChanged. A refused object becomes an error row where another object of the shard
    can be read after it. Where none can, the store refuses everything: raises ObjectRefused.
    """
    readable = deque[Encoded](maxlen=READERS)  # rows to test a refusal with, without their bytes
    pending = list[Encoded]()  # wanted rows since a refusal, held until another object was tried
    refusal = ""
    for row in read_each(rows, is_wanted, version_of):
        if row.reason is None:  # it was read, or is not wanted
            readable.append(replace(row, data=None))
        if is_wanted(row.index):
            pending.append(row)
        if isinstance(row, _RefusedRow):
            refusal = row.message
        while (
            refusal and readable and _read_row(readable[-1], version_of(readable[-1].index)).reason
        ):
            readable.pop()
        if readable or not refusal:
            yield from pending
            pending = []
            refusal = ""
    if refusal:
        raise ObjectRefused(refusal)


def read_each(
    rows: Iterable[Encoded],
    is_wanted: Callable[[int], bool],
    version_of: Callable[[int], str | None] = lambda index: None,
) -> Iterator[Encoded]:
    """All rows in order. A wanted row without bytes and reason gets the object at its uri.

    At most READERS objects are read at once. A refused object is a `missing` row. Raises
    ObjectChanged.
    """
    waiting: deque[Encoded | Future[Encoded]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for row in rows:
            is_complete = row.data is not None or row.reason is not None or not is_wanted(row.index)
            waiting.append(
                row if is_complete else pool.submit(_read_row, row, version_of(row.index))
            )
            while waiting and (isinstance(waiting[0], Encoded) or len(waiting) >= READERS):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def _result(row: Encoded | Future[Encoded]) -> Encoded:
    return row if isinstance(row, Encoded) else row.result()


def _read_row(row: Encoded, version: str | None) -> Encoded:
    data = b""
    try:
        with storage.store_for(row.uri).open(row.uri, version) as stream:
            while len(data) <= MAX_IMAGE_BYTES and (chunk := stream.read(CHUNK_BYTES)):
                data += chunk
    except ObjectMissing as error:
        if version is not None:
            raise ObjectChanged(f"{row.uri} was deleted since it was listed") from error
        if row.spellings:
            other = _read_row(replace(row, uri=row.spellings[0], spellings=row.spellings[1:]), None)
            if other.data is not None:
                return other
        return replace(row, reason=Reason.MISSING, message=str(error))
    except ObjectRefused as error:
        return _RefusedRow(
            row.index, row.key, row.uri, None, Reason.MISSING, str(error), row.passthrough
        )
    if len(data) > MAX_IMAGE_BYTES:
        reason, message = too_large(len(data))
        return replace(row, reason=reason, message=message)
    return replace(row, data=data)


def _stem_of(url: str) -> str:
    """The readable part of an id.

    It is never empty and never begins like `_x` or `.x`, because many tools skip such names.
    """
    name = url.rstrip("/").rsplit("/", 1)[-1]
    stem = name.rsplit(".", 1)[0] or name
    return re.sub(r"[^A-Za-z0-9._]", "_", stem)[:60].lstrip("._") or "shard"
