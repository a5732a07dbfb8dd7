"""A pointer: one small JSON object that names the current version of a dataset.

Readers follow it, so that a new version appears for all of them at once. It also lists the earlier
versions. Each change replaces the whole object, on condition that nobody else changed it meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from vitray.dataset.scratch_space import require_conditional_replace
from vitray.errors import JobError, ObjectChanged, ObjectMissing, StorageError
from vitray.storage import absolute, exists, is_local, read, store_for

MARK = "vitray_pointer"  # the field that tells a pointer from any other file; its value: the format
FORMAT = 1
MAX_BYTES = 16 << 20  # 60,000 versions; a larger file is no pointer, and is not read
ATTEMPTS = 20  # of a change, when others change the pointer meanwhile


class VersionState(StrEnum):
    """What became of a version's dataset."""

    KEPT = "kept"
    DELETING = "deleting"  # some of its files may be gone
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Version:
    """A dataset that the pointer named at some time.

    previous: the number of the version that was current before it. promoted: a time in ISO format.
    """

    number: int
    dataset: str
    fingerprint: str
    promoted: str
    by: str
    previous: int | None = None
    state: VersionState = VersionState.KEPT

    def __str__(self) -> str:
        state = "" if self.state is VersionState.KEPT else f", {self.state}"
        return f"version {self.number}: {self.dataset} (promoted {self.promoted}{state})"


@dataclass(frozen=True, slots=True)
class Pointer:
    """The versions, oldest first, and the number of the current one.

    changed, by: when the current version was last set, and by whom.
    """

    current: int
    changed: str
    by: str
    versions: tuple[Version, ...]

    def version(self, number: int) -> Version | None:
        """The version of that number, if there is one."""
        return next((version for version in self.versions if version.number == number), None)

    @property
    def current_version(self) -> Version:
        """The version that readers get."""
        return next(version for version in self.versions if version.number == self.current)


@dataclass(frozen=True, slots=True)
class StoredPointer:
    """A pointer as it was read. version: of the object, for a conditional replace."""

    pointer: Pointer
    version: str


# ------------------------------------------------------------------------ decisions


def promoted(old: Pointer | None, dataset: str, fingerprint: str, at: str, by: str) -> Pointer:
    """The pointer after a promotion. A dataset that is current already changes nothing.

    Raises JobError for a dataset that `vitray clean` has begun to delete.
    """
    if old is None:
        first = Version(1, dataset, fingerprint, at, by)
        return Pointer(1, at, by, (first,))
    current = old.current_version
    if (current.dataset, current.fingerprint) == (dataset, fingerprint):
        return old
    for version in old.versions:
        if version.state is VersionState.DELETING and version.dataset == dataset:
            raise JobError(
                f"{dataset} is being deleted, as version {version.number}: "
                "promote another dataset, or wait for vitray clean and make it again."
            )
    number = old.versions[-1].number + 1
    new = Version(number, dataset, fingerprint, at, by, previous=old.current)
    return Pointer(number, at, by, (*old.versions, new))


def rolled_back(old: Pointer, to: int | None, at: str, by: str) -> Pointer:
    """The pointer after a rollback.

    to: a version's number; None for the one that was current before. Raises JobError
    where there is no such version, or where its dataset was deleted.
    """
    number = old.current_version.previous if to is None else to
    if number is None:
        raise JobError(
            f"version {old.current} is the first one: there is none to go back to. " + _choices(old)
        )
    version = old.version(number)
    if version is None:
        raise JobError(f"there is no version {number}. {_choices(old)}")
    if version.state is not VersionState.KEPT:
        raise JobError(f"version {number} was deleted ({version.dataset}). {_choices(old)}")
    return old if number == old.current else replace(old, current=number, changed=at, by=by)


def _choices(pointer: Pointer) -> str:
    others = [
        str(version.number)
        for version in pointer.versions
        if version.state is VersionState.KEPT and version.number != pointer.current
    ]
    if not others:
        return "No other version is kept."
    return f"Choose another by --to: {', '.join(others)}."


def versions_to_delete(pointer: Pointer, keep: int) -> tuple[Version, ...]:
    """The versions whose datasets may go: all but the current one and the newest keep - 1 others.

    A dataset that several versions name counts once, and stays if one of them is kept. A dataset
    within or around a kept one stays, too. A deletion that has begun goes on. keep: 1 or more.
    """
    kept = [pointer.current_version.dataset]
    for version in reversed(pointer.versions):
        is_kept = version.state is VersionState.KEPT and version.dataset not in kept
        if is_kept and len(kept) < keep:
            kept.append(version.dataset)
    return tuple(
        version
        for version in pointer.versions
        if version.state is not VersionState.DELETED
        and not any(_overlap(version.dataset, url) for url in kept)
    )


def _overlap(one: str, other: str) -> bool:
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


def with_state(pointer: Pointer, numbers: Collection[int], state: VersionState) -> Pointer:
    """The pointer with another state of these versions."""
    versions = tuple(
        replace(version, state=state) if version.number in numbers else version
        for version in pointer.versions
    )
    return replace(pointer, versions=versions)


def refusal_of(url: str, pointer: Pointer) -> str:
    """Why a command that changes a dataset does not follow a pointer."""
    current = pointer.current_version
    return (
        f"{url} is a pointer to {current.dataset} (version {current.number}), and this command "
        "changes a dataset: name that directory, or another one."
    )


# ------------------------------------------------------------------------ storage


def to_json(pointer: Pointer) -> bytes:
    """The content of a pointer. The dataset stands at the top, for people and for other tools."""
    current = pointer.current_version
    document = {
        MARK: FORMAT,
        "current": pointer.current,
        "dataset": current.dataset,
        "fingerprint": current.fingerprint,
        "changed": pointer.changed,
        "by": pointer.by,
        "versions": [asdict(version) for version in pointer.versions],
    }
    return json.dumps(document, indent=1).encode()


def parse(url: str, data: bytes) -> Pointer | None:
    """The pointer in an object; None for any other object.

    Raises StorageError for one that is damaged, or that a later vitray wrote.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or MARK not in document:
        return None
    if document[MARK] != FORMAT:
        raise StorageError(
            f"{url} is a pointer in format {document[MARK]!r}, and this vitray reads {FORMAT}. "
            "Use the version of vitray that wrote it."
        )
    try:
        versions = tuple(_version_of(values) for values in document["versions"])
        pointer = Pointer(
            int(document["current"]), str(document["changed"]), str(document["by"]), versions
        )
        numbers = [version.number for version in versions]
        if pointer.current not in numbers or numbers != sorted(set(numbers)):
            raise ValueError("its numbers are wrong")
        for version in versions:
            _require_url(url, version.dataset)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{url} is a damaged pointer ({error}). Restore a copy of it, "
            "or delete it and promote a dataset again."
        ) from error
    return pointer


def _version_of(values: dict[str, Any]) -> Version:
    names = {field.name for field in fields(Version)}
    known = {name: value for name, value in values.items() if name in names}
    version = Version(**{**known, "state": VersionState(known["state"])})
    texts = (version.dataset, version.fingerprint, version.promoted, version.by)
    if not isinstance(version.number, int) or not all(isinstance(text, str) for text in texts):
        raise TypeError("a version has a field of another type")
    return version


def _require_url(url: str, dataset: str) -> None:
    """Raises ValueError for a dataset that a pointer must not name.

    Who can write into a bucket must not choose what is read or deleted on a disk.
    """
    if dataset != absolute(dataset) or not dataset.isprintable():
        raise ValueError(f"{dataset!r} is no absolute URL")
    if is_local(dataset) and not is_local(url):
        raise ValueError(f"it names the local path {dataset}")


def read_pointer(url: str) -> StoredPointer | None:
    """The pointer at a path or URL; None where there is none.

    Raises StorageError for a damaged pointer.
    """
    url = absolute(url)
    if not is_local(url) and url.count("/") < 3:  # a bucket
        return None
    try:
        info = store_for(url).stat(url)
        if info.size > MAX_BYTES:
            return None
        data = read(url, info.version)
    except ObjectMissing:
        return None
    except ObjectChanged:
        return read_pointer(url)
    pointer = parse(url, data)
    return None if pointer is None else StoredPointer(pointer, info.version)


def change_pointer(url: str, change: Callable[[Pointer | None], Pointer]) -> Pointer:
    """Replace a pointer by what `change` makes of it, and return that.

    It is read and changed again if somebody else changed it meanwhile. Nothing is written where
    nothing changes. Raises JobError where another file stands at the URL, and UnsafeStore for a
    store that ignores conditions.
    """
    url = absolute(url)
    store = store_for(url)
    for _ in range(ATTEMPTS):
        stored = read_pointer(url)
        new = change(None if stored is None else stored.pointer)
        if stored is not None and new == stored.pointer:
            return new
        body = to_json(new)
        if stored is None:
            is_written = not exists(url) and store.create(url, body)
            if is_written:
                require_conditional_replace(url, body)
        else:
            require_conditional_replace(url, to_json(stored.pointer))
            is_written = store.replace_version(url, stored.version, body)
        # refused: it may be this very change, whose answer was lost
        if is_written or _content(url) == body:
            return new
        if stored is None and read_pointer(url) is None:
            raise JobError(
                f"{url} is a folder, or a file that is no pointer of vitray: choose another name."
            )
    raise StorageError(f"{url}: others keep changing this pointer. Run the same command again.")


def _content(url: str) -> bytes | None:
    try:
        return read(url)
    except (ObjectMissing, ObjectChanged):
        return None
