"""A directory tree. Creates by link(2), which is atomic and refuses an existing name. Private to this room."""

from __future__ import annotations

import contextlib
import errno
import glob as globbing
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NoReturn

from vitray.crash import crash_point
from vitray.errors import ObjectChanged, ObjectMissing, StorageError, UnsafeStore
from vitray.storage.objects import ABANDONED_S, TMP_PREFIX, ObjectInfo, absolute

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class LocalStore:
    def find(self, prefix: str) -> list[ObjectInfo]:
        root = absolute(prefix)
        if os.path.isfile(root):
            return [self.stat(root)]
        walk = os.walk(root, onerror=lambda error: _raise_in_walk(error, root))
        paths = (os.path.join(folder, name) for folder, _, names in walk for name in names)
        return self._infos(path for path in paths if not os.path.basename(path).startswith(TMP_PREFIX))

    def glob(self, pattern: str) -> list[ObjectInfo]:
        return self._infos(globbing.iglob(absolute(pattern), recursive=True))

    def _infos(self, paths: Iterable[str]) -> list[ObjectInfo]:
        found = []
        for path in paths:
            if odd := _oddity(path):  # listed, so that it is reported
                found.append(ObjectInfo(path, -1, odd))
                continue
            with contextlib.suppress(ObjectMissing):  # a folder, or deleted since it was listed
                found.append(self.stat(path))
        return sorted(found, key=lambda info: info.url)

    def stat(self, url: str) -> ObjectInfo:
        path = absolute(url)
        try:
            status = os.stat(path)
        except OSError as error:
            _raise_read(error, path)
        if stat.S_ISDIR(status.st_mode):
            raise ObjectMissing(f"{path} does not exist as a file: it is a folder")
        return ObjectInfo(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}", status.st_mtime)

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        path = absolute(url)
        if version is not None and self.stat(path).version != version:
            raise ObjectChanged(f"{path} changed since it was listed")
        try:
            return open(path, "rb", buffering=1 << 20)
        except OSError as error:
            _raise_read(error, path)

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        path = absolute(url)
        with _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                raise UnsafeStore(
                    f"{path}: this file system has no hard links ({error.strerror}), which an atomic commit needs. "
                    "Put `out` on a local disk (ext4, xfs, btrfs, zfs), on NFS, or on s3://."
                ) from error
        return True

    def replace(self, url: str, data: bytes) -> None:
        path = absolute(url)
        with _temporary(path, data) as temporary:
            os.replace(temporary, path)

    def abandoned(self, prefix: str) -> list[str]:
        walk = os.walk(absolute(prefix))
        found = [os.path.join(folder, name) for folder, _, names in walk for name in names if name.startswith(TMP_PREFIX)]
        return [path for path in found if os.path.exists(path) and time.time() - os.path.getmtime(path) > ABANDONED_S]

    def delete_folder(self, url: str) -> None:
        with contextlib.suppress(OSError):  # not empty: somebody writes there
            os.rmdir(absolute(url))

    def delete_tree(self, url: str) -> None:
        shutil.rmtree(absolute(url), ignore_errors=True)  # a file stays
        self.delete([url] if os.path.isfile(absolute(url)) else [])

    def delete(self, urls: Iterable[str]) -> None:
        for url in urls:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(absolute(url))
            except OSError as error:
                _raise_local(error, url)


@contextlib.contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A file beside the path that holds the data, to be linked or moved there; it is gone at the end, the rest on the disk."""
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
    for _ in range(2):  # another run may remove the folder, when it is empty, between the two calls or inside the first
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)
            return open(path, "xb")
    os.makedirs(folder, exist_ok=True)
    return open(path, "xb")


def _oddity(path: str) -> str:
    """Why a name in a folder is no file that could be read."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "is a link to nothing" if os.path.islink(path) else ""
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is no regular file"


def _raise_in_walk(error: OSError, root: str) -> None:
    """A folder that another run removed meanwhile holds nothing; only the root itself must be there."""
    if error.errno != errno.ENOENT or error.filename == root:
        _raise_read(error, root)


def _raise_read(error: OSError, path: str) -> NoReturn:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        raise ObjectMissing(f"{path} does not exist") from error
    _raise_local(error, path)


def _raise_local(error: OSError, path: str) -> NoReturn:
    step = {
        errno.ENOSPC: "The disk is full: free some space and run the same command again.",
        errno.EDQUOT: "The quota is used up: free some space and run the same command again.",
        errno.EACCES: "Check the permissions, or choose another path.",
        errno.ENOTDIR: "A file stands where a folder must be: choose another path.",
        errno.EROFS: "The file system is read-only: choose another `out`.",
    }.get(error.errno or 0, "Check the path and the disk.")
    raise StorageError(f"{path}: {error.strerror}. {step}") from error


def fsync(path: str) -> None:
    """What a file, or a folder's list of names, holds is on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
