"""A directory tree. Creates by link(2), which is atomic and refuses an existing name. Private to
this package.
"""

from __future__ import annotations

import contextlib
import errno
import glob as globbing
import io
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NoReturn

from vitray.crash import crash_point
from vitray.errors import ObjectChanged, ObjectMissing, ObjectRefused, StorageError, UnsafeStore
from vitray.storage.objects import ABANDONED_S, TMP_PREFIX, ObjectInfo, absolute

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# one file's own fault, and no better when it is asked for again; what a network file system says
# while it is away is not here
REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# of a byte that is no UTF-8, and of the backslash before what looks like one
ESCAPE = r"\\u(dc(?:[89a-f][0-9a-f]|5c))"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class LocalStore:
    """URLs are UTF-8, names on a disk need not be: a byte that is none is `\\udcXX` in a URL (see on_disk)."""

    def find(self, prefix: str) -> list[ObjectInfo]:
        found, _ = self.find_all(prefix)
        return [info for info in found if not os.path.basename(info.url).startswith(TMP_PREFIX)]

    def find_all(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        root = on_disk(prefix)
        if os.path.isfile(root):
            return [self.stat(prefix)], []
        paths, linked_folders = list[str](), list[str]()
        for folder, folders, names in os.walk(
            root, onerror=lambda error: _raise_in_walk(error, root)
        ):
            paths += [os.path.join(folder, name) for name in names]
            inside = (os.path.join(folder, name) for name in folders)
            linked_folders += [_url_of(path) for path in inside if os.path.islink(path)]
        return self._infos(paths), linked_folders

    def glob(self, pattern: str) -> list[ObjectInfo]:
        found = globbing.iglob(
            _with_literal_folders(on_disk(pattern)), recursive=True, include_hidden=True
        )
        cycles = dict[str, bool]()
        return self._infos(
            path for path in found if not _is_in_cycle(os.path.dirname(path), cycles)
        )

    def _infos(self, paths: Iterable[str]) -> list[ObjectInfo]:
        found = []
        for path in paths:
            if odd := _oddity(path):  # listed, so that it is reported
                found.append(ObjectInfo(_url_of(path), -1, odd))
                continue
            with contextlib.suppress(ObjectMissing):  # a folder, or deleted since it was listed
                found.append(self.stat(_url_of(path)))
        return sorted(found, key=lambda info: info.url)

    def stat(self, url: str) -> ObjectInfo:
        path = on_disk(url)
        try:
            status = os.stat(path)
        except OSError as error:
            _raise_read(error, path)
        if stat.S_ISDIR(status.st_mode):
            raise ObjectMissing(f"{absolute(url)} does not exist as a file: it is a folder")
        return ObjectInfo(
            absolute(url), status.st_size, f"{status.st_size}-{status.st_mtime_ns}", status.st_mtime
        )

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        if version is not None and self.stat(url).version != version:
            raise ObjectChanged(f"{absolute(url)} changed since it was listed")
        try:
            return io.BufferedReader(_File(on_disk(url)), 1 << 20)
        except OSError as error:
            _raise_read(error, on_disk(url))

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        path = on_disk(url)
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise UnsafeStore(
                    f"{path}: this file system has no hard links ({error.strerror}), which an "
                    f"atomic commit needs. "
                    "Put `out` on a local disk (ext4, xfs, btrfs, zfs), on NFS, or on s3://."
                ) from error
        return True

    def replace(self, url: str, data: bytes) -> None:
        path = on_disk(url)
        with _temporary(path, data) as temporary:
            os.replace(temporary, path)

    def abandoned(self, prefix: str) -> list[str]:
        walk = os.walk(on_disk(prefix))
        found = [
            os.path.join(folder, name)
            for folder, _, names in walk
            for name in names
            if name.startswith(TMP_PREFIX)
        ]
        return [
            path
            for path in found
            if os.path.exists(path) and time.time() - os.path.getmtime(path) > ABANDONED_S
        ]

    def delete_folder(self, url: str) -> None:
        with contextlib.suppress(OSError):  # not empty: somebody writes there
            os.rmdir(on_disk(url))

    def delete_tree(self, url: str) -> None:
        shutil.rmtree(on_disk(url), ignore_errors=True)  # a file stays
        self.delete([url] if os.path.isfile(on_disk(url)) else [])

    def delete(self, urls: Iterable[str]) -> None:
        for url in urls:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(on_disk(url))
            except OSError as error:
                _raise_local(error, url)


class _File(io.FileIO):
    """A file that is open, whose faults are ours."""

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            _raise_read(error, str(self.name))


def _is_in_cycle(folder: str, known: dict[str, bool]) -> bool:
    """Whether a link on the way to a folder leads back to a folder on the way. known: grows by the
    answers.
    """
    if folder not in known:
        parent = os.path.dirname(folder)
        is_link = os.path.islink(folder)
        leads_back = is_link and f"{os.path.realpath(parent)}/".startswith(
            f"{os.path.realpath(folder)}/"
        )
        known[folder] = leads_back or (parent != folder and _is_in_cycle(parent, known))
    return known[folder]


def _with_literal_folders(pattern: str) -> str:
    """A glob in which folders that are there stand for themselves, such as `[raw] 2024` in front of
    `/*.jpg`.
    """
    *folders, name = pattern.split("/")
    for count in range(len(folders), 0, -1):
        start = "/".join(folders[:count])
        if start and os.path.isdir(start):
            return "/".join([globbing.escape(start), *folders[count:], name])
    return pattern


def on_disk(url: str) -> str:
    """The absolute path that a local URL names, as the system has it."""
    return re.sub(ESCAPE, lambda code: chr(int(code[1], 16)), absolute(url)).replace("\udc5c", "\\")


def _url_of(path: str) -> str:
    """The URL of an absolute path; on_disk() leads back, also from a name that looks like an escape
    itself.
    """
    return (
        re.sub(rf"\\(?={ESCAPE[2:]})", r"\\udc5c", path)
        .encode("utf-8", "backslashreplace")
        .decode()
    )


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A file beside the path that holds the data, to be linked or moved there; it is gone at the
    end, the rest on the disk.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, TMP_PREFIX + uuid.uuid4().hex)
    try:
        with _new_file(temporary) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        crash_point("object-written")
        yield temporary
        fsync(folder)
    except OSError as error:
        _raise_local(error, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _new_file(path: str) -> BinaryIO:
    folder = os.path.dirname(path)
    for _ in range(
        2
        # another run may remove the folder, when it is empty, between the two calls or inside the
        # first
    ):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(path, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(path, "xb")


def _oddity(path: str) -> str:
    """Why a name in a folder is no file that could be read."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return "is a link to nothing"
        return f"cannot be looked at: {error.strerror}" if error.errno in REFUSED else ""
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is no regular file"


def _raise_in_walk(error: OSError, root: str) -> None:
    """A folder that another run removed meanwhile holds nothing; only the root itself must be
    there.
    """
    if error.errno != errno.ENOENT or error.filename == root:
        _raise_read(error, root)


def _raise_read(error: OSError, path: str) -> NoReturn:
    if error.errno in ABSENT:
        raise ObjectMissing(f"{_url_of(path)} does not exist") from error
    _raise_local(error, path, ObjectRefused if error.errno in REFUSED else StorageError)


def _raise_local(error: OSError, path: str, kind: type[StorageError] = StorageError) -> NoReturn:
    step = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again.",
        errno.EDQUOT: "The quota is used up: free some space and run the same command again.",
        errno.EACCES: "Check the permissions, or choose another path.",
        errno.ENOTDIR: "A file stands where a folder must be: choose another path.",
        errno.EROFS: "The file system is read-only: choose another `out`.",
    }.get(error.errno or 0, "Check the path and the disk.")
    raise kind(f"{_url_of(path)}: {error.strerror}. {step}") from error


def fsync(path: str) -> None:
    """What a file, or a folder's list of names, holds is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
