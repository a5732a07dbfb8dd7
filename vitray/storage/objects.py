"""What every store answers and how a call is retried. Private to this package."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, TypeVar

from vitray.errors import StorageError

ATTEMPTS = 10
ABANDONED_S = 3600
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
    """What vitray asks of storage. URLs are whole; a local path is a URL too."""

    def find(self, prefix: str) -> list[ObjectInfo]:
        """Every object under a prefix (a directory or one object), in the order of URLs."""

    def find_all(self, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
        """What `find` says, and half-written files too; and the linked folders that were not
        entered.
        """

    def glob(self, pattern: str) -> list[ObjectInfo]: ...

    def stat(self, url: str) -> ObjectInfo: ...

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        """A seekable stream of bounded memory. Raises ObjectChanged when it is not (or no longer)
        that version.
        """

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        """Make an object exist, whole or not at all. False: refused, something is there (perhaps by
        a lost answer: look).
        """

    def replace(self, url: str, data: bytes) -> None: ...

    def delete(self, urls: Iterable[str]) -> None: ...

    def abandoned(self, prefix: str) -> list[str]:
        """Half-written files that a killed process left, an hour old or more. None can exist on
        S3.
        """

    def delete_folder(self, url: str) -> None:
        """Remove a folder if it is empty, where folders exist."""

    def delete_tree(self, url: str) -> None:
        """Remove an object, or a folder and all that is in it; nothing where there is none."""


def is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The URL without a trailing slash, a local path made absolute."""
    if is_local(url):
        return os.path.abspath(url.removeprefix("file://"))
    return url.rstrip("/")


def retrying(what: str, call: Callable[[], T], transient: Callable[[Exception], bool]) -> T:
    """The call's answer within ATTEMPTS tries, full-jitter backoff up to 8 s."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not transient(error):
                raise
            if attempt == ATTEMPTS - 1:
                raise StorageError(
                    f"{what}: no answer in {ATTEMPTS} tries, last: {reason(error)}. Is the store "
                    f"up and reachable? "
                    "Then run the same command again."
                ) from error
            time.sleep(random.uniform(0, min(8.0, 0.1 * 2**attempt)))
    raise AssertionError


def reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
