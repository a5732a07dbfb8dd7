"""Scratch objects within an output directory, and the check that its store can commit."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator

from vitray.dataset.layout import internal_url, is_scratch, scratch_url
from vitray.errors import ObjectMissing, StorageError, UnsafeStore
from vitray.storage import ABANDONED_S, is_local, read, store_for

_FIRST = b"vitray probe"
_SECOND = b"vitray probe again"
_NO_VERSION = "0" * 32  # an etag that no object has


def check_store(out: str) -> None:
    """Raises UnsafeStore for a store that does not refuse a second conditional create."""
    store = store_for(out)
    with scratch(out) as url:
        # a refusal means that its answer was lost, and that a second attempt met the first
        store.create(url, _FIRST)
        is_created_twice = store.create(url, _SECOND)
        content = read(url)
    if is_created_twice or content != _FIRST:
        raise UnsafeStore(
            f"{out}: the store ignored a conditional create (If-None-Match), "
            "so two runs could overwrite each other. "
            "Use a store that honours it (AWS S3, Ceph, MinIO) or a local disk with hard links."
        )


def check_replace(out: str) -> None:
    """Raises UnsafeStore for a store that replaces an object whatever its version is."""
    if is_local(out):  # vitray itself compares the versions there
        return
    with scratch(out) as url:
        store_for(url).create(url, _FIRST)
        require_conditional_replace(url, _FIRST)


def require_conditional_replace(url: str, content: bytes) -> None:
    """Raises UnsafeStore for a store that replaces an object whatever its version is.

    content: of the object at the URL, which such a store writes again.
    """
    if not is_local(url) and store_for(url).replace_version(url, _NO_VERSION, content):
        raise UnsafeStore(
            f"{url}: the store ignored the condition of a replace (If-Match), so of two commands "
            "at once one could undo the other. "
            "Use a store that honours it (AWS S3, Ceph, MinIO)."
        )


@contextlib.contextmanager
def scratch(out: str) -> Iterator[str]:
    """The URL of a new object or folder in `out`, deleted when the block ends.

    It is within `out`, since another bucket might begin next to it.
    """
    store = store_for(out)
    url = scratch_url(out, uuid.uuid4().hex)
    try:
        yield url
    except StorageError as error:  # the random name means nothing to a reader
        raise type(error)(str(error).replace(url, out)) from error
    finally:
        store.delete_tree(url)
        store.delete_folder(internal_url(out))  # a job that is refused later leaves nothing
        store.delete_folder(out)


def drop_scratch(out: str) -> list[str]:
    """Delete the scratch of killed processes, unchanged for an hour or more; returns its URLs."""
    store = store_for(out)
    prefix = scratch_url(out, "")
    latest_change = dict[str, float]()
    with contextlib.suppress(ObjectMissing):
        for info in store.find(internal_url(out)):
            if is_scratch(out, info.url):
                url = prefix + info.url.removeprefix(prefix).split("/")[0]
                latest_change[url] = max(latest_change.get(url, 0.0), info.modified or 0.0)
    oldest = time.time() - ABANDONED_S
    abandoned = [url for url, changed in latest_change.items() if changed < oldest]
    for url in abandoned:
        store.delete_tree(url)
    return abandoned
