"""Manifests: Parquet, CSV or JSONL files whose rows name images elsewhere.

A manifest is data, so its paths are not trusted: they are followed only below the allowed prefixes.
"""

from __future__ import annotations

import os.path
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from urllib.parse import unquote

from vitray import storage
from vitray.errors import ShardError, count
from vitray.job import Job
from vitray.schema import Encoded, End, Reason, Shard, SourceRules
from vitray.sources.objects import part_of, printable, read_in_order
from vitray.sources.tables import count_rows, key_of, read_rows, read_schema, with_folder_columns

MAX_URL_BYTES = 1024  # S3's limit of a key; it answers a longer one with 400, not with 404
# An image as base64. No path looks like that: letters of both cases and digits, and no dot.
_DATA = re.compile(
    r"data:image/|(?=.{0,99}[A-Z])(?=.{0,99}[a-z])(?=.{0,99}[0-9])[A-Za-z0-9+/=]{256}"
)
Located = tuple[str, Reason | None, str]  # URL, reason, message


def split_manifest(shard: Shard, job: Job) -> list[Shard]:
    """Ranges of job.group_size rows. Raises ShardError."""
    read_schema(shard, job)  # reports a file without columns before the rows are counted
    rows = count_rows(shard, job)
    if rows <= job.group_size:
        return [replace(shard, rows=rows)]
    spans = [(start, min(start + job.group_size, rows)) for start in range(0, rows, job.group_size)]
    return [part_of(shard, "rows", b - a, shard.size * (b - a) // rows, (a, b)) for a, b in spans]


def read_manifest(
    shard: Shard, job: Job, is_wanted: Callable[[int], bool]
) -> Iterator[Encoded | End]:
    """The images that a range of rows names, then the End."""
    total = count_rows(shard, job) if shard.rows is None else shard.rows
    notes = list[str]()
    if total:
        yield from read_in_order(_rows(shard, job, total, notes), is_wanted, lambda index: None)
    yield End(total, note="; ".join(notes))


def allowed_prefixes(shard: Shard, job: Job) -> list[str]:
    """Paths in this file are followed below these prefixes: job.allow, else the file's folder."""
    return [storage.absolute(prefix) for prefix in job.allow] or [_folder_of(shard)]


def resolve_path(
    path: object, shard: Shard, allowed: Sequence[str], job: Job
) -> tuple[Located, tuple[str, ...]]:
    """Where the object of a path is, and other URLs to try when no object is there.

    The first item is (URL, None, ""), or (the path as shown, reason, message) for an error row.

    Source rules 2 drop `./` on S3, as on disk. If no object has the written name, the spellings of
    other systems are tried. This happens here for a local path, and on a store when the object is
    read.
    """
    folder = _folder_of(shard)
    located = _locate(path, folder, allowed, job.rules)
    if job.rules == SourceRules.V1 or not isinstance(path, str):
        return located, ()
    is_good = located[1] is None
    if is_good and storage.is_local(located[0]):
        return located, ()
    respelled = [_locate(text, folder, allowed, job.rules) for text in _spellings(path)]
    good = [location for location in respelled if location[1] is None]
    if good and not is_good:
        located = good.pop(0)
    return located, tuple(url for url, _, _ in good)


def _spellings(path: str) -> list[str]:
    """Other spellings of a path: / for a backslash, %20 decoded, Unicode's other normal form."""
    spellings = [path]
    if "\\" in path:
        spellings.append(path.replace("\\", "/"))
    if "%" in path:
        spellings.append(unquote(path))
    if not path.isascii():
        spellings += [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
    return [spelling for spelling in dict.fromkeys(spellings) if spelling != path]


def _rows(shard: Shard, job: Job, total: int, notes: list[str]) -> Iterator[Encoded]:
    allowed = allowed_prefixes(shard, job)
    rows = range(shard.start, shard.start + total)
    index = -1
    for index, row in enumerate(read_rows(shard, job, rows, notes)):
        if row.problem:
            key = str(shard.start + index)
            passthrough = with_folder_columns(None, shard.url, job)
            yield Encoded(index, key, shard.url, None, Reason.MISSING, row.problem, passthrough)
            continue
        is_path = not isinstance(row.path, str) or not _DATA.match(row.path)
        key = key_of(row.key, row.path if is_path else None, shard.start + index)
        (uri, reason, message), spellings = resolve_path(row.path, shard, allowed, job)
        passthrough = with_folder_columns(row.passthrough, uri or shard.url, job)
        yield Encoded(
            index, key, uri or shard.url, None, reason, message, passthrough, spellings=spellings
        )
    if index + 1 != total:
        raise ShardError(
            f"{shard.url} has {count(index + 1, 'row')}, {total:,} were listed. "
            "Replace or remove it, then "
            "run again."
        )


def _folder_of(shard: Shard) -> str:
    return shard.url.rpartition("/")[0] or "/"


def _locate(path: object, folder: str, allowed: Sequence[str], rules: SourceRules) -> Located:
    if not isinstance(path, str) or not path:
        return "", Reason.MISSING, "the row names no object"
    if _DATA.match(path):
        why = "image data as text (base64, data:) is not read: store bytes in a binary column"
        return path[:64], Reason.PATH_NOT_ALLOWED, why
    scheme, _, location = path.partition("://")
    shown = printable(path)[:500]
    if location and scheme.lower() in ("http", "https"):
        why = f"{shown} is not followed: vitray reads local paths and s3://, not web URLs"
        return shown, Reason.PATH_NOT_ALLOWED, why
    if rules >= SourceRules.V2 and not location:
        path = "/".join(part for part in path.split("/") if part != ".")
    url = storage.absolute(path if location or path.startswith("/") else storage.join(folder, path))
    if ".." in path.split("/"):
        why = f"{shown}: `..` in a path is not followed; write the path below `allow` without it"
        return shown, Reason.PATH_NOT_ALLOWED, why
    is_odd = (location and scheme not in ("file", "s3")) or "\0" in path or printable(path) != path
    if is_odd or not any(_is_below(prefix, url) for prefix in allowed):
        return (
            shown,
            Reason.PATH_NOT_ALLOWED,
            f"{shown} is not below the allowed prefixes (`allow`)",
        )
    is_too_long = len(url.encode()) > MAX_URL_BYTES
    # isfile and not exists: reading a pipe or a device would block for ever.
    if is_too_long or (storage.is_local(url) and not os.path.isfile(storage.on_disk(url))):
        return url[:500], Reason.MISSING, f"{url[:500]} does not exist or is not a file"
    return url, None, ""


def _is_below(prefix: str, url: str) -> bool:
    """By whole path components: /data/ab is not below /data/a. Symbolic links may not lead out."""
    if not url.startswith(prefix.rstrip("/") + "/"):
        return False
    real = [
        os.path.realpath(storage.on_disk(name)) for name in (url, prefix) if storage.is_local(name)
    ]
    return not real or real[0].startswith(real[1].rstrip("/") + "/")
