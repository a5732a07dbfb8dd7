"""Notes in a dataset about the pointers that name it.

A pointer lists its datasets, and a dataset does not know its pointers. So a promotion leaves a note
in the dataset, before it changes the pointer. A deletion reads the notes and asks each pointer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass

from vitray.dataset.files import under
from vitray.dataset.identity import Dataset
from vitray.dataset.layout import pointers_url
from vitray.dataset.pointer import Pointer, Version, read_pointer
from vitray.errors import AccessError, JobError, ObjectChanged, ObjectMissing, one_line
from vitray.storage import absolute, is_local, on_disk, read, store_for

log = logging.getLogger(__name__)

NAME_DIGITS = 16  # of the SHA-256 of a pointer's URL


@dataclass(frozen=True, slots=True)
class Use:
    """The current version of another pointer. pointer, note: URLs."""

    pointer: str
    version: int
    note: str


def note_pointer(dataset: Dataset, pointer: str, at: str) -> None:
    """Leave a note in a dataset that a pointer names it. at: a time in ISO format.

    Without the right to write there, logs a warning. A dataset on S3 gets no note about a pointer
    on a local disk: see _pointer_of.
    """
    if _is_elsewhere(dataset, pointer):
        return
    body = json.dumps({"pointer": pointer, "promoted": at}, indent=1).encode()
    try:
        store_for(dataset.out).create(_note_url(dataset, pointer), body)
    except AccessError as error:
        log.warning(
            "vitray clean with another pointer will not know that %s names this dataset: %s",
            pointer,
            error,
        )


def other_use(dataset: Dataset, pointer: str) -> Use | None:
    """The current version of another pointer than this one, if it is this dataset; else None.

    pointer: a URL. Older versions of other pointers do not count: else two pointers with the same
    old dataset would keep each other from deleting it. Raises JobError for a pointer that this
    user may not read, StorageError for a damaged one.
    """
    for info in under(pointers_url(dataset.out)):
        url = _pointer_of(dataset, info.url)
        if url is None or _is_same(url, pointer):
            continue
        other = _read_other(url, info.url)
        current = None if other is None else other.current_version
        if current is not None and _is_of(current, dataset):
            return Use(url, current.number, info.url)
    return None


def _is_of(version: Version, dataset: Dataset) -> bool:
    return (version.dataset, version.fingerprint) == (dataset.out, dataset.fingerprint)


def _note_url(dataset: Dataset, pointer: str) -> str:
    digits = hashlib.sha256(pointer.encode("utf-8", "surrogatepass")).hexdigest()[:NAME_DIGITS]
    return pointers_url(dataset.out, f"{digits}.json")


def _is_elsewhere(dataset: Dataset, pointer: str) -> bool:
    return is_local(pointer) and not is_local(dataset.out)


def _is_same(one: str, other: str) -> bool:
    """Whether two URLs name one pointer; on a disk, links may lead to it."""
    if not is_local(one) or not is_local(other):
        return one == other
    return os.path.realpath(on_disk(one)) == os.path.realpath(on_disk(other))


def _pointer_of(dataset: Dataset, note: str) -> str | None:
    """The URL of the pointer in a note; None for a damaged note, and for one that is gone.

    Who can write into a bucket must not choose what is read on a disk.
    """
    try:
        url = json.loads(read(note))["pointer"]
    except (ObjectMissing, ObjectChanged, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(url, str) or not url.isprintable() or url != absolute(url):
        return None
    if _is_elsewhere(dataset, url) or _note_url(dataset, url) != note:
        return None
    return url


def _read_other(url: str, note: str) -> Pointer | None:
    try:
        stored = read_pointer(url)
    except AccessError as error:
        raise JobError(
            f"{url} may name this dataset, and cannot be read ({one_line(error)}). "
            f"If that pointer does not exist any more, delete {note}."
        ) from error
    return None if stored is None else stored.pointer
