"""Manifests: Parquet, CSV or JSONL whose rows name images elsewhere. Private to this room.

A manifest is data, so its paths are not trusted: they are followed only below the allowed prefixes.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vitray import storage
from vitray.errors import ShardError
from vitray.job import Job
from vitray.schema import Encoded, End, Shard
from vitray.sources.objects import follow, part_of, printable
from vitray.sources.tables import columns_to_read, count_rows, key_of, read_rows, read_schema

MAX_URL_BYTES = 1024  # S3's limit of a key; a longer one is answered with 400, not with 404


def split_manifest(whole: Shard, job: Job) -> list[Shard]:
    """Ranges of job.group_size rows. Raises ShardError."""
    rows = count_rows(whole)
    if rows <= job.group_size:
        return [replace(whole, rows=rows)]
    spans = [(start, min(start + job.group_size, rows)) for start in range(0, rows, job.group_size)]
    return [part_of(whole, "rows", b - a, whole.size * (b - a) // rows, (a, b)) for a, b in spans]


def read_manifest(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The images that a range of rows names, then the End."""
    total = count_rows(shard) if shard.rows is None else shard.rows
    if total:
        yield from follow(_rows(shard, job, total), wanted, lambda index: None)
    yield End(total)


def _rows(shard: Shard, job: Job, total: int) -> Iterator[Encoded]:
    names = columns_to_read(read_schema(shard), shard.kind, job)
    folder = shard.url.rpartition("/")[0] or "/"
    allowed = [storage.absolute(prefix) for prefix in job.allow] or [folder]
    index = -1
    for index, row in enumerate(read_rows(shard, names, range(shard.start, shard.start + total))):
        if isinstance(row, str):
            yield Encoded(index, str(shard.start + index), shard.url, None, "missing", row, (None,) * len(job.keep))
            continue
        path = row[names[0]]
        key = key_of(row[job.key_column] if job.key_column else None, path, shard.start + index)
        uri, reason, message = _locate(path, folder, allowed)
        yield Encoded(index, key, uri or shard.url, None, reason, message, tuple(row[name] for name in job.keep))
    if index + 1 != total:
        raise ShardError(f"{shard.url}: {index + 1} rows came, {total} were listed. Replace or remove it, then run again.")


def _locate(path: object, folder: str, allowed: Sequence[str]) -> tuple[str, str | None, str]:
    """(uri, None, "") of the object that a path means, or why it is not read: (what was named, reason, message)."""
    if not isinstance(path, str) or not path:
        return "", "missing", "the row names no object"
    scheme, _, rest = path.partition("://")
    shown = printable(path)[:500]
    url = storage.absolute(path if rest or path.startswith("/") else storage.join(folder, path))
    odd = (rest and scheme not in ("file", "s3")) or "\0" in path or ".." in path.split("/") or printable(path) != path
    if odd or not any(_is_below(prefix, url) for prefix in allowed):
        return shown, "path_not_allowed", f"{shown} is not below the allowed prefixes (`allow`)"
    # isfile: a pipe or a device below the prefix would block for ever
    if len(url.encode()) > MAX_URL_BYTES or (storage.is_local(url) and not os.path.isfile(storage.on_disk(url))):
        return url[:500], "missing", f"{url[:500]} does not exist or is no file"
    return url, None, ""


def _is_below(prefix: str, url: str) -> bool:
    """Whole path components count: /data/ab is not inside /data/a. Symbolic links may not lead out."""
    if not url.startswith(prefix.rstrip("/") + "/"):
        return False
    real = [os.path.realpath(storage.on_disk(name)) for name in (url, prefix) if storage.is_local(name)]
    return not real or real[0].startswith(real[1].rstrip("/") + "/")
