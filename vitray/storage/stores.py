"""The store that a URL names, and calls on one object."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from io import BufferedReader
from typing import cast

from vitray.errors import JobError, ObjectMissing
from vitray.storage.local import LocalStore
from vitray.storage.objects import Store, is_local
from vitray.storage.s3 import S3Store


def store_for(url: str) -> Store:
    """The store that a URL names: a path, file:// or s3://. Raises JobError for other schemes."""
    if is_local(url):
        return LocalStore()
    if url.startswith("s3://"):
        names = [name for name in os.environ if name.startswith("AWS_")]
        return s3_store(os.getpid(), tuple((name, os.environ.get(name)) for name in names))
    scheme = url.partition("://")[0]
    raise JobError(f"{url}: vitray reads and writes local paths and s3://, not {scheme}://")


@lru_cache(maxsize=4)
def s3_store(pid: int, environment: tuple[tuple[str, str | None], ...]) -> S3Store:
    """One client per process and account: event loops do not survive a fork."""
    return S3Store()


def join(base: str, *parts: str) -> str:
    """A URL below another one."""
    return "/".join([base.rstrip("/"), *parts])


def read(url: str, version: str | None = None) -> bytes:
    """All bytes of an object. Raises ObjectMissing; ObjectChanged where it is not that version."""
    with store_for(url).open(url, version) as stream:
        return stream.read()


def exists(url: str) -> bool:
    """Whether there is an object of that name; a folder is not an object."""
    try:
        store_for(url).stat(url)
    except ObjectMissing:
        return False
    return True


def sha256_of(url: str) -> str:
    """SHA-256 of an object's bytes, as hex digits."""
    with store_for(url).open(url) as stream:
        return hashlib.file_digest(cast(BufferedReader, stream), "sha256").hexdigest()
