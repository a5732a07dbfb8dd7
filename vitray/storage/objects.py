"""The interface of a store, and how a call is retried."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, TypeVar

from vitray.errors import StorageError, one_line

ATTEMPTS = 10
ABANDONED_S = 3600  # a temporary file that has not changed for so long belongs to a killed process
TMP_PREFIX = ".tmp-"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object. version: its etag on S3, size and mtime on a local disk."""

    url: str
    size: int
    version: str
    modified: float | None = field(default=None, compare=False)  # seconds since 1970


class Store(Protocol):
    """The calls that vitray needs of a store. URLs are complete; a local path is a URL too."""

    def find(self, prefix: str) -> list[ObjectInfo]:
        """Every object under a prefix (a directory or one object), in the order of URLs."""

    def find_few(self, prefix: str) -> list[ObjectInfo]:
        """Like `find`, by one request, of a prefix that is mostly empty.

        A bucket that does not exist looks empty.
        """

    def find_all(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        """Like `find`, with half-written files; and the linked folders, which are not entered."""

    def glob(self, pattern: str) -> list[ObjectInfo]: ...

    def stat(self, url: str) -> ObjectInfo: ...

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        """A seekable stream of bounded memory.

        Raises ObjectChanged when the object is not that version, or does not stay that version.
        """

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        """Create an object, whole or not at all, unless one exists.

        False: an object exists. It may be this one, when the answer to an earlier attempt was lost.
        """

    def replace(self, url: str, data: bytes) -> None: ...

    def replace_version(
        self, url: str, version: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> bool:
        """Replace that version of an object, whole or not at all.

        False: it is another version or absent. It may be this one, when the answer to an earlier
        attempt was lost.
        """

    def delete(self, urls: Iterable[str]) -> None: ...

    def abandoned(self, prefix: str) -> list[str]:
        """Half-written files of killed processes, an hour old or more. S3 cannot have any."""

    def delete_folder(self, url: str) -> None:
        """Remove a folder if it is empty, where folders exist."""

    def delete_tree(self, url: str) -> None:
        """Remove an object, or a folder and everything in it, if it exists."""


def is_local(url: str) -> bool:
    """Whether a URL is a path, or file://."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The URL without a trailing slash, a local path made absolute."""
    if is_local(url):
        return os.path.abspath(url.removeprefix("file://"))
    return url.rstrip("/")


def retrying(what: str, call: Callable[[], T], transient: Callable[[Exception], bool]) -> T:
    """The result of the call, after at most ATTEMPTS attempts with full-jitter backoff up to 8 s.

    what: the URL, for messages. transient: whether another attempt after an error may succeed.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            if attempt == ATTEMPTS - 1:
                raise StorageError(
                    f"{what}: no answer in {ATTEMPTS} attempts, last: {reason(error)}. "
                    "Check that the store is up and reachable, then run the same command again."
                ) from error
            time.sleep(random.uniform(0, min(8.0, 0.1 * 2**attempt)))
    raise AssertionError


def reason(error: BaseException) -> str:
    """The message of an error, for one of ours."""
    return one_line(error, 300)
