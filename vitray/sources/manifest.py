"""Manifests: Parquet, CSV or JSONL whose rows name images elsewhere. Private to this package.

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
from vitray.errors import ShardError
from vitray.job import Job
from vitray.schema import Encoded, End, Shard
from vitray.sources.objects import follow, part_of, printable
from vitray.sources.tables import count_rows, key_of, read_rows, read_schema, with_folder_columns

MAX_URL_BYTES = 1024  # S3's limit of a key; a longer one is answered with 400, not with 404
# base64 of an image, which no path looks like: letters of both cases and digits, and no dot
_DATA = re.compile(
    r"data:image/|(?=.{0,99}[A-Z])(?=.{0,99}[a-z])(?=.{0,99}[0-9])[A-Za-z0-9+/=]{256}"
)
Located = tuple[str, str | None, str]  # URL, reason, message


def split_manifest(whole: Shard, job: Job) -> list[Shard]:
    """Ranges of job.group_size rows. Raises ShardError."""
    read_schema(whole, job)  # what has no columns is told before anything is counted
    rows = count_rows(whole, job)
    if rows <= job.group_size:
        return [replace(whole, rows=rows)]
    spans = [(start, min(start + job.group_size, rows)) for start in range(0, rows, job.group_size)]
    return [part_of(whole, "rows", b - a, whole.size * (b - a) // rows, (a, b)) for a, b in spans]


def read_manifest(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The images that a range of rows names, then the End."""
    total, notes = count_rows(shard, job) if shard.rows is None else shard.rows, list[str]()
    if total:
        yield from follow(_rows(shard, job, total, notes), wanted, lambda index: None)
    yield End(total, note="; ".join(notes))


def allowed_prefixes(shard: Shard, job: Job) -> list[str]:
    """The prefixes below which a path in this file is followed: job.allow, else the file's own
    folder.
    """
    return [storage.absolute(prefix) for prefix in job.allow] or [_folder_of(shard)]


def follow_path(
    path: object, shard: Shard, allowed: Sequence[str], job: Job
) -> tuple[Located, tuple[str, ...]]:
    """(URL, None, "") of the object that a path in this file means, or (what was named, reason,
    message); and other URLs.

    By source rules 2 `./` is dropped on S3 as on disk. Where no object has the name as it is
    written,
    the spellings of other systems are tried: on a disk here, on a store when the object is read.
    """
    located = _locate(path, _folder_of(shard), allowed, job.rules)
    if job.rules == 1 or not isinstance(path, str) or not (others := _spellings(path)):
        return located, ()
    if located[1] is None and storage.is_local(located[0]):
        return located, ()
    found = [_locate(other, _folder_of(shard), allowed, job.rules) for other in others]
    good = [other for other in found if other[1] is None]
    if located[1] is None:
        return located, tuple(url for url, _, _ in good)
    return (good[0], tuple(url for url, _, _ in good[1:])) if good else (located, ())


def _spellings(path: str) -> list[str]:
    """A path with slashes for backslashes, with %20 and the like decoded, and in Unicode's other
    normal form.
    """
    found = [path]
    if "\\" in path:
        found.append(path.replace("\\", "/"))
    if "%" in path:
        found.append(unquote(path))
    if not path.isascii():
        found += [unicodedata.normalize(form, path) for form in ("NFC", "NFD")]
    return [other for other in dict.fromkeys(found) if other != path]


def _rows(shard: Shard, job: Job, total: int, notes: list[str]) -> Iterator[Encoded]:
    allowed = allowed_prefixes(shard, job)
    index = -1
    for index, row in enumerate(
        read_rows(shard, job, range(shard.start, shard.start + total), notes)
    ):
        if row.problem:
            passthrough = with_folder_columns(None, shard.url, job)
            yield Encoded(
                index,
                str(shard.start + index),
                shard.url,
                None,
                "missing",
                row.problem,
                passthrough,
            )
            continue
        is_path = not isinstance(row.path, str) or not _DATA.match(row.path)
        key = key_of(row.key, row.path if is_path else None, shard.start + index)
        (uri, reason, message), spellings = follow_path(row.path, shard, allowed, job)
        passthrough = with_folder_columns(row.passthrough, uri or shard.url, job)
        yield Encoded(
            index, key, uri or shard.url, None, reason, message, passthrough, spellings=spellings
        )
    if index + 1 != total:
        raise ShardError(
            f"{shard.url}: {index + 1} rows came, {total} were listed. Replace or remove it, then "
            f"run again."
        )


def _folder_of(shard: Shard) -> str:
    return shard.url.rpartition("/")[0] or "/"


def _locate(path: object, folder: str, allowed: Sequence[str], rules: int) -> Located:
    if not isinstance(path, str) or not path:
        return "", "missing", "the row names no object"
    if _DATA.match(path):
        return (
            path[:64],
            "path_not_allowed",
            "image data as text (base64, data:) is not read: store bytes in a binary column",
        )
    scheme, _, rest = path.partition("://")
    shown = printable(path)[:500]
    if rest and scheme.lower() in ("http", "https"):
        return (
            shown,
            "path_not_allowed",
            f"{shown} is not followed: vitray reads local paths and s3://, not web URLs",
        )
    if rules > 1 and not rest:
        path = "/".join(part for part in path.split("/") if part != ".")
    url = storage.absolute(path if rest or path.startswith("/") else storage.join(folder, path))
    if ".." in path.split("/"):
        return (
            shown,
            "path_not_allowed",
            f"{shown}: `..` in a path is not followed; write the path below `allow` without it",
        )
    odd = (rest and scheme not in ("file", "s3")) or "\0" in path or printable(path) != path
    if odd or not any(_is_below(prefix, url) for prefix in allowed):
        return shown, "path_not_allowed", f"{shown} is not below the allowed prefixes (`allow`)"
    # isfile: a pipe or a device below the prefix would block for ever
    if len(url.encode()) > MAX_URL_BYTES or (
        storage.is_local(url) and not os.path.isfile(storage.on_disk(url))
    ):
        return url[:500], "missing", f"{url[:500]} does not exist or is no file"
    return url, None, ""


def _is_below(prefix: str, url: str) -> bool:
    """Whole path components count: /data/ab is not inside /data/a. Symbolic links may not lead
    out.
    """
    if not url.startswith(prefix.rstrip("/") + "/"):
        return False
    real = [
        os.path.realpath(storage.on_disk(name)) for name in (url, prefix) if storage.is_local(name)
    ]
    return not real or real[0].startswith(real[1].rstrip("/") + "/")
