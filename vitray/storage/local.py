"""A directory tree as a store.

Objects are created by link(2), which is atomic and refuses an existing name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from vitray.errors import (
    AccessError,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StorageError,
    UnsafeStore,
)
from vitray.storage.objects import ABANDONED_S, TMP_PREFIX, ObjectInfo, absolute

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# permanent faults of one file; a network file system that is away has other errors
REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EUCLEAN,
    errno.EBADMSG,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
# stands for a byte that is not UTF-8, and for the backslash of a name that looks like an escape
ESCAPE = r"\\u(dc(?:[89a-f][0-9a-f]|5c))"
# faults of a path that a user chose
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class LocalStore:
    """Files as objects. A byte of a name that is not UTF-8 is `\\udcXX` in its URL: see on_disk."""

    def find(self, prefix: str) -> list[ObjectInfo]:
        infos, _ = self.find_all(prefix)
        return [info for info in infos if not os.path.basename(info.url).startswith(TMP_PREFIX)]

    def find_few(self, prefix: str) -> list[ObjectInfo]:
        return self.find(prefix)

    def find_all(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        root = on_disk(prefix)
        if os.path.isfile(root):
            return [self.stat(prefix)], []
        paths = list[str]()
        linked_folders = list[str]()
        for folder, folders, names in os.walk(
            root, onerror=lambda error: _raise_in_walk(error, root)
        ):
            paths += [os.path.join(folder, name) for name in names]
            inside = (os.path.join(folder, name) for name in folders)
            linked_folders += [_url_of(path) for path in inside if os.path.islink(path)]
        return self._infos(paths), linked_folders

    def glob(self, pattern: str) -> list[ObjectInfo]:
        path_pattern = _with_literal_folders(on_disk(pattern))
        paths = globbing.iglob(path_pattern, recursive=True, include_hidden=True)
        cycles = dict[str, bool]()
        return self._infos(
            path for path in paths if not _is_in_cycle(os.path.dirname(path), cycles)
        )

    def _infos(self, paths: Iterable[str]) -> list[ObjectInfo]:
        infos = list[ObjectInfo]()
        for path in paths:
            if problem := _unreadable(path):  # listed, so that it is reported
                infos.append(ObjectInfo(_url_of(path), -1, problem))
                continue
            with contextlib.suppress(ObjectMissing):  # a folder, or deleted since it was listed
                infos.append(self.stat(_url_of(path)))
        return sorted(infos, key=lambda info: info.url)

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
                    f"{path}: this file system has no hard links ({error.strerror}), "
                    "which an atomic commit needs. "
                    "Put `out` on a local disk (ext4, xfs, btrfs, zfs), on NFS, or on s3://."
                ) from error
        return True

    def replace(self, url: str, data: bytes) -> None:
        path = on_disk(url)
        with _temporary(path, data) as temporary:
            os.replace(temporary, path)

    def replace_version(
        self, url: str, version: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> bool:
        path = on_disk(url)
        with _temporary(path, data) as temporary, _locked(os.path.dirname(path)):
            try:
                if self.stat(url).version != version:
                    return False
            except ObjectMissing:
                return False
            os.replace(temporary, path)
        return True

    def abandoned(self, prefix: str) -> list[str]:
        paths = list[str]()
        for folder, _, names in os.walk(on_disk(prefix)):
            paths += [os.path.join(folder, name) for name in names if name.startswith(TMP_PREFIX)]
        oldest = time.time() - ABANDONED_S
        return [path for path in paths if os.path.exists(path) and os.path.getmtime(path) < oldest]

    def delete_folder(self, url: str) -> None:
        with contextlib.suppress(OSError):  # not empty: another process writes there
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
    """An open file whose errors are StorageErrors."""

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            _raise_read(error, str(self.name))


def _is_in_cycle(folder: str, results: dict[str, bool]) -> bool:
    """Whether a link in a folder's path leads back to one of its parents. results: a cache."""
    if folder not in results:
        parent = os.path.dirname(folder)
        is_link = os.path.islink(folder)
        leads_back = is_link and f"{os.path.realpath(parent)}/".startswith(
            f"{os.path.realpath(folder)}/"
        )
        results[folder] = leads_back or (parent != folder and _is_in_cycle(parent, results))
    return results[folder]


def _with_literal_folders(pattern: str) -> str:
    """A glob in which existing folders are literal, such as `[raw] 2024` in `[raw] 2024/*.jpg`."""
    *folders, name = pattern.split("/")
    for count in range(len(folders), 0, -1):
        start = "/".join(folders[:count])
        if start and os.path.isdir(start):
            return "/".join([globbing.escape(start), *folders[count:], name])
    return pattern


def on_disk(url: str) -> str:
    """The absolute path that a local URL names, as the system spells it."""
    return re.sub(ESCAPE, lambda code: chr(int(code[1], 16)), absolute(url)).replace("\udc5c", "\\")


def _url_of(path: str) -> str:
    """The URL of an absolute path: the inverse of on_disk(), also for names that look escaped."""
    return (
        re.sub(rf"\\(?={ESCAPE[2:]})", r"\\udc5c", path)
        .encode("utf-8", "backslashreplace")
        .decode()
    )


def missing_folders(url: str) -> list[str]:
    """A local folder and those above it that do not exist, the innermost first."""
    folders = list[str]()
    path = absolute(url)
    while not os.path.lexists(path):
        folders.append(path)
        path = os.path.dirname(path)
    return folders


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A file with the data beside the path, to be linked or moved there within the block.

    The file is deleted at the end, and the folder's list of names is on the disk.
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


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """A lock among the processes that compare a version and replace it; a killed one loses it.

    A file system without locks on folders, such as NFS, goes without.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _new_file(path: str) -> BinaryIO:
    folder = os.path.dirname(path)
    # another run may remove the empty folder between the two calls, or during the first one
    for _ in range(2):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(path, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(path, "xb")


def _unreadable(path: str) -> str:
    """Why a name in a folder is not a readable file; empty for a file or a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            return "is a link to nothing"
        return f"cannot be looked at: {error.strerror}" if error.errno in REFUSED else ""
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is not a regular file"


def _raise_in_walk(error: OSError, root: str) -> None:
    """Raises, unless another run removed a folder below the root meanwhile."""
    if error.errno != errno.ENOENT or error.filename == root:
        _raise_read(error, root)


def _raise_read(error: OSError, path: str) -> NoReturn:
    if error.errno in ABSENT:
        raise ObjectMissing(f"{_url_of(path)} does not exist") from error
    _raise_local(error, path, ObjectRefused if error.errno in REFUSED else None)


def _raise_local(error: OSError, path: str, kind: type[StorageError] | None = None) -> NoReturn:
    if kind is None:
        kind = AccessError if error.errno in NO_ACCESS else StorageError
    step = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again.",
        errno.EDQUOT: "The quota is used up: free some space and run the same command again.",
        errno.EACCES: "Check the permissions, or choose another path.",
        errno.EEXIST: "A file stands where a folder must be: choose another path.",
        errno.ENOTDIR: "A file stands where a folder must be: choose another path.",
        errno.EROFS: "The file system is read-only: choose another `out`.",
    }.get(error.errno or 0, "Check the path and the disk.")
    raise kind(f"{_url_of(path)}: {error.strerror}. {step}") from error


def fsync(path: str) -> None:
    """Write a file, or a folder's list of names, from the cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
