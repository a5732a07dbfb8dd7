"""The only door to storage: list, read, stream, create-if-absent, on a local disk and on S3.

Every call has a deadline and ten attempts with jittered backoff. Reads are conditional on the
version that was planned. pyarrow's own file systems are not used: see docs/decisions/0008.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedReader
from typing import cast

from fsspec.utils import glob_translate

from vitray.errors import JobError, ObjectMissing, StorageError, UnsafeStore
from vitray.schema import ALL_IMAGE_SUFFIXES
from vitray.storage.folder import new_folder
from vitray.storage.local import LocalStore, on_disk
from vitray.storage.objects import ABANDONED_S, ObjectInfo, Store, absolute, is_local
from vitray.storage.s3 import S3Store

__all__ = [
    "Found", "ObjectInfo", "absolute", "drop_scratch", "exists", "expand", "is_local", "join", "new_folder", "on_disk",
    "probe", "read", "scratch", "search", "sha256_of", "store_for",
]  # fmt: skip
SCRATCH = "probe-"
NAS_FOLDERS = ("@eaDir", "#recycle", "#snapshot")  # thumbnails and rubbish of network disks


def store_for(url: str) -> Store:
    """The store that a URL names: a path, file:// or s3://."""
    if is_local(url):
        return LocalStore()
    if url.startswith("s3://"):
        return _s3(
            os.getpid(),
            tuple((name, os.environ.get(name)) for name in os.environ if name.startswith("AWS_")),
        )
    raise JobError(
        f"{url}: vitray reads and writes local paths and s3://, not {url.partition('://')[0]}://"
    )


def join(base: str, *parts: str) -> str:
    return "/".join([base.rstrip("/"), *parts])


def read(url: str, version: str | None = None) -> bytes:
    with store_for(url).open(url, version) as stream:
        return stream.read()


def exists(url: str) -> bool:
    try:
        store_for(url).stat(url)
    except ObjectMissing:
        return False
    return True


def probe(out: str) -> None:
    """Refuse a store on which a second conditional create would not be refused."""
    store = store_for(out)
    with scratch(out) as url:
        store.create(
            url, b"vitray probe"
        )  # refused: its answer was lost, and the second try found it
        second = store.create(url, b"vitray probe again")
        kept = read(url)
    if second or kept != b"vitray probe":
        raise UnsafeStore(
            f"{out}: the store ignored a conditional create (If-None-Match), so two runs could "
            f"overwrite each other. "
            "Use a store that honours it (AWS S3, Ceph, MinIO) or a local disk with hard links."
        )


@contextlib.contextmanager
def scratch(out: str) -> Iterator[str]:
    """A name within `out`, since next to it another bucket might begin, for an object or a folder;
    nothing is left when the block ends.
    """
    store, url = store_for(out), join(out, "_vitray", f"{SCRATCH}{uuid.uuid4().hex}")
    try:
        yield url
    except StorageError as error:  # the name means nothing to whoever reads it
        raise type(error)(str(error).replace(url, out)) from error
    finally:
        store.delete_tree(url)
        for folder in (
            join(out, "_vitray"),
            out,
        ):  # a job that is refused after this leaves nothing
            store.delete_folder(folder)


def drop_scratch(out: str) -> list[str]:
    """Delete the scratch of killed processes: that in which nothing has changed for an hour;
    returns its names.
    """
    store, inside, latest = (
        store_for(out),
        join(absolute(out), "_vitray", SCRATCH),
        dict[str, float](),
    )
    with contextlib.suppress(ObjectMissing):
        for info in store.find(join(absolute(out), "_vitray")):
            if info.url.startswith(inside):
                name = inside + info.url.removeprefix(inside).split("/")[0]
                latest[name] = max(latest.get(name, 0.0), info.modified or 0.0)
    old = [name for name, changed in latest.items() if time.time() - changed > ABANDONED_S]
    for name in old:
        store.delete_tree(name)
    return old


@dataclass(frozen=True, slots=True)
class Found:
    """What a pattern names, in order.

    hidden: the URLs below it with a name that begins with a dot or an underscore which nobody asked
    for.
    linked_folders: folders behind symbolic links, which are not entered.
    """

    objects: list[ObjectInfo]
    hidden: list[str]
    linked_folders: list[str]


def search(pattern: str, rules: int = 1) -> Found:
    """The objects that a URL, glob, {000..099} range or prefix names. Raises ObjectMissing for one
    that names none.

    rules: of the source, see Job. By rules 2 folders such as `_year=2026` are partitions of a
    table, and not hidden; a NAS's own folders are; and `**` inside a name is refused.
    """
    found = Found([], [], [])
    for url in expand_braces(pattern):
        store = store_for(url)
        if _wild(url) and rules > 1:
            _require_whole_globstars(url)
        infos, linked_folders = (store.glob(url), []) if _wild(url) else store.find_all(url)
        if not infos:
            hint = (
                " (a star stays within its folder: give the folder itself, or /**)"
                if url.endswith("/*")
                else ""
            )
            raise ObjectMissing(f"{url} names no object{hint}")
        is_hidden = _hidden_by(absolute(url), rules)
        for info in infos:
            if is_hidden(info.url):
                found.hidden.append(info.url)
            else:
                found.objects.append(info)
        found.linked_folders.extend(linked_folders)
    return found


def _require_whole_globstars(pattern: str) -> None:
    """Raises JobError for `**` inside a name, which fsspec and Python's glob read differently."""
    for part in pattern.split("/"):
        if "**" in part and part != "**":
            raise JobError(
                f"{pattern}: `**` stands for whole folders. Write **/{part.replace('**', '*')} "
                f"instead of {part}."
            )


def expand(pattern: str) -> list[ObjectInfo]:
    """The objects of `search`."""
    return search(pattern).objects


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..002}.tar` -> three URLs, zeros kept; `{x,y}` works too; ranges of at most a
    million.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match or (is_local(pattern) and os.path.lexists(absolute(pattern))):
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    if match[3] is not None:
        middles: Iterable[str] = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + 1_000_000:
            raise JobError(f"{pattern}: the range {match[0]} is empty or longer than a million")
        middles = (str(n).zfill(len(match[1])) for n in range(first, last + 1))
    return [url for middle in middles for url in expand_braces(head + middle + tail)]


def reads(pattern: str, out: str, name: str = "data/x.parquet") -> bool:
    """Whether a URL, glob or prefix names what is written into `out` under such a name, be it by a
    link.
    """
    if is_local(pattern) and is_local(out):
        pattern, out = os.path.realpath(pattern), os.path.realpath(out)
    written = f"{out}/{name}"
    if _wild(pattern):
        _require_whole_globstars(pattern)
    return written.startswith(f"{pattern}/") or bool(
        _wild(pattern) and re.match(glob_translate(pattern), written)
    )


def _hidden_by(pattern: str, rules: int) -> Callable[[str], bool]:
    """Whether a name below the base starts with a dot or an underscore (marks of other tools, not
    data), unasked for.

    Not an image's: cameras call theirs _DSC0001.JPG. The base is the pattern up to its first wild
    folder; `_*.tar` asks for underscores.
    """
    wild = _wild(pattern)
    base = pattern[: pattern.rfind("/", 0, wild.start()) + 1] if wild else pattern
    asked = {part[:1] for part in pattern[len(base) :].split("/")}

    def is_hidden(url: str) -> bool:
        *folders, name = url.removeprefix(base).split("/")
        is_image = name.rpartition(".")[2].lower() in ALL_IMAGE_SUFFIXES
        if rules > 1:
            if any(part in NAS_FOLDERS for part in folders):
                return True
            folders = [part for part in folders if not (part.startswith("_") and "=" in part)]
        return (
            any(part[:1] in {".", "_"} - asked for part in folders)
            or name[:1] in {".", *("_" * (not is_image))} - asked
        )

    return is_hidden


def _wild(pattern: str) -> re.Match[str] | None:
    """Where a glob begins; None for a plain name, and for a local one with such characters that is
    there.
    """
    wild = re.search(r"[*?\[]", pattern)
    return None if wild and is_local(pattern) and os.path.lexists(absolute(pattern)) else wild


@lru_cache(maxsize=4)
def _s3(pid: int, environment: tuple[tuple[str, str | None], ...]) -> S3Store:
    """One client a process and account: event loops do not survive a fork."""
    return S3Store()


def sha256_of(url: str) -> str:
    with store_for(url).open(url) as stream:
        return hashlib.file_digest(cast(BufferedReader, stream), "sha256").hexdigest()
