"""Versions of a dataset behind a pointer: promote one, roll back, delete old ones."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from rich.filesize import decimal

from vitray.clock import utc_now
from vitray.crash import crash_point
from vitray.dataset import (
    Dataset,
    Pointer,
    Version,
    VersionState,
    change_pointer,
    delete_dataset,
    find_dataset,
    has_live_run,
    is_complete,
    list_dataset_files,
    note_pointer,
    other_use,
    promoted,
    read_pointer,
    require_complete,
    require_dataset,
    require_outside,
    rolled_back,
    row_counts,
    versions_to_delete,
    with_state,
)
from vitray.errors import JobError, count
from vitray.operations.requester import default_requester
from vitray.storage import absolute, is_local

FINGERPRINT_CHARS = 8  # of a fingerprint in text
OTHERS_SHOWN = 3  # files that stay


@dataclass(frozen=True, slots=True)
class PointerChange:
    """What a pointer names now, and what it named before.

    version: the number of the current version. previous, previous_dataset, previous_rows,
    previous_fingerprint: of the version before this change; None where there was none, the rows
    also where its dataset is gone. changed: False where the pointer named this version already.
    complete: whether the dataset is.
    """

    pointer: str
    version: int
    dataset: str
    fingerprint: str
    rows: int
    complete: bool
    changed: bool
    by: str
    previous: int | None
    previous_dataset: str | None
    previous_fingerprint: str | None
    previous_rows: int | None

    def __str__(self) -> str:
        now = f"version {self.version}: {self.dataset}, {count(self.rows, 'row')}"
        partial = "" if self.complete else ", NOT complete"
        if not self.changed:
            return f"{self.pointer} is at {now}{partial} already; nothing changed"
        lines = [f"{self.pointer} is at {now}{partial}"]
        if self.previous is not None:
            rows = "gone" if self.previous_rows is None else count(self.previous_rows, "row")
            lines.append(f"before     version {self.previous}: {self.previous_dataset}, {rows}")
            lines += self._fingerprint_lines()
        return "\n".join(lines)

    def _fingerprint_lines(self) -> list[str]:
        old = str(self.previous_fingerprint)[:FINGERPRINT_CHARS]
        new = self.fingerprint[:FINGERPRINT_CHARS]
        if self.previous_fingerprint == self.fingerprint:
            return [f"same job   fingerprint {new}…: same model and settings"]
        return [f"other job  fingerprint {old}… -> {new}…: another model or other settings"]


@dataclass(frozen=True, slots=True)
class OldVersion:
    """A version whose dataset goes, or went.

    files, size_bytes: what vitray wrote there. others: files that stay, since vitray did not write
    them. gone: whether there was no such dataset any more.
    """

    version: int
    dataset: str
    files: int
    size_bytes: int
    others: tuple[str, ...]
    gone: bool

    def __str__(self) -> str:
        head = f"version {self.version}: {self.dataset}, "
        if self.gone:
            return f"{head}gone already"
        text = f"{head}{count(self.files, 'file')}, {decimal(self.size_bytes)}"
        if self.others:
            shown = ", ".join(self.others[:OTHERS_SHOWN])
            text += f"; {count(len(self.others), 'file')} of others stay, such as {shown}"
        return text


@dataclass(frozen=True, slots=True)
class Retention:
    """The versions of a pointer that stay, and those that go.

    current: a version's number. kept: numbers of versions with a dataset, with the current one.
    old: versions whose datasets go. deleted: whether they did; otherwise they are only listed.
    """

    pointer: str
    current: int
    kept: tuple[int, ...]
    old: tuple[OldVersion, ...]
    deleted: bool

    @property
    def what(self) -> str:
        """The datasets that go, as text."""
        datasets = {old.dataset for old in self.old if not old.gone}
        return count(len(datasets), "dataset")

    def describe(self) -> str:
        """A line for each version that goes, and one about those that stay."""
        kept = ", ".join(map(str, self.kept))
        noun = "version" if len(self.kept) == 1 else "versions"
        stay = f"kept       {noun} {kept}; {self.current} is current"
        return "\n".join([*map(str, self.old), stay])

    def __str__(self) -> str:
        if not self.old:
            return f"{self.describe()}\n{self.pointer}: no older version; nothing to delete"
        done = f"deleted {self.what}" if self.deleted else f"{self.what} would be deleted"
        return f"{self.describe()}\n{self.pointer}: {done}"


def promote(
    out: str, pointer: str, *, partial: bool = False, by: str | None = None
) -> PointerChange:
    """Make a pointer name a dataset.

    partial: accept a dataset that is not complete. by: who asks; user@host by default.

    Raises JobError where there is no complete dataset, for a pointer within the dataset or its
    source, and where another file stands at the pointer. Two promotions at once both become a
    version; the later one is current.
    """
    dataset = require_dataset(out) if partial else require_complete(out)
    url = absolute(pointer)
    _require_place(dataset, url)
    before = _Before()
    requester = by or default_requester()

    def change(old: Pointer | None) -> Pointer:
        at = utc_now()
        new = promoted(before.note(old), dataset.out, dataset.fingerprint, at, requester)
        note_pointer(dataset, url, at)
        return new

    new = change_pointer(url, change)
    return _change_of(url, before.pointer, new, dataset)


def rollback(pointer: str, to: int | None = None, *, by: str | None = None) -> PointerChange:
    """Make a pointer name an earlier version again. to: its number; None for the previous one.

    Raises JobError where there is no such version, or where its dataset is gone.
    """
    url = absolute(pointer)
    before = _Before()
    datasets = dict[int, Dataset]()

    def change(old: Pointer | None) -> Pointer:
        at = utc_now()
        new = rolled_back(_required(url, before.note(old)), to, at, by or default_requester())
        dataset = datasets[new.current] = _dataset_of(new.current_version)
        note_pointer(dataset, url, at)
        return new

    new = change_pointer(url, change)
    return _change_of(url, before.pointer, new, datasets[new.current])


def preview_retention(pointer: str, keep: int) -> Retention:
    """What delete_old_versions would delete. Reads only. keep: 1 or more.

    Raises JobError where there is no pointer, or where another one names one of these datasets.
    """
    url = absolute(pointer)
    known = _required(url, _pointer_at(url))
    doomed = versions_to_delete(known, keep)
    _require_no_other_pointer(url, doomed)
    return _retention(url, known, doomed, deleted=False)


def delete_old_versions(
    pointer: str, keep: int, listed: Collection[int] | None = None
) -> Retention:
    """Delete the datasets of old versions: all but the current one and the newest keep - 1 others.

    listed: only versions with these numbers, such as those that a person agreed to; None for all.
    Deletes only files that vitray writes. After a kill, the same call continues. Raises JobError
    where there is no pointer, where another one names one of these datasets or a run works in it,
    and FingerprintError where data files of another job are among those of a dataset.
    """
    url = absolute(pointer)
    doomed: tuple[Version, ...] = ()

    def begin(old: Pointer | None) -> Pointer:
        nonlocal doomed
        known = _required(url, old)
        doomed = tuple(
            version
            for version in versions_to_delete(known, keep)
            if listed is None or version.number in listed
        )
        return with_state(known, [v.number for v in doomed], VersionState.DELETING)

    begin(_pointer_at(url))
    listed = [version.number for version in doomed]
    # before the first change: nothing is deleted if one of them is refused
    _require_no_other_pointer(url, doomed)
    _require_no_run(doomed)
    old = tuple(map(_old_version, doomed))
    known = change_pointer(url, begin)
    crash_point("version-marked")
    for version in doomed:
        dataset = _found(version)
        if dataset is not None:
            delete_dataset(dataset, list_dataset_files(dataset))
        known = change_pointer(url, _mark(url, version.number))
    begun = {version.number for version in doomed}
    went = tuple(version for version in old if version.version in begun)
    return Retention(url, known.current, _kept(known, ()), went, deleted=bool(went))


def _require_no_run(versions: Collection[Version]) -> None:
    """Raises JobError where a run works in a dataset of these versions."""
    for version in versions:
        if _found(version) is not None and has_live_run(version.dataset):
            raise JobError(
                f"a run works in {version.dataset} (version {version.number}) now: "
                "wait until it ends, or stop it, then run the same command again."
            )


def _require_no_other_pointer(url: str, versions: Collection[Version]) -> None:
    """Raises JobError where another pointer names a dataset of these versions. url: the pointer."""
    for version in versions:
        dataset = _found(version)
        use = None if dataset is None else other_use(dataset, url)
        if use is not None:
            raise JobError(
                f"{version.dataset} (version {version.number}) stays: {use.pointer} names it as "
                f"version {use.version}, its current version. Nothing was deleted. Keep more "
                "versions; or, if that pointer does not need this dataset, delete "
                f"{use.note} and run this again."
            )


def _mark(url: str, number: int) -> Callable[[Pointer | None], Pointer]:
    return lambda old: with_state(_required(url, old), [number], VersionState.DELETED)


class _Before:
    """The pointer before a change, from the attempt that succeeded."""

    def __init__(self) -> None:
        self.pointer: Pointer | None = None

    def note(self, pointer: Pointer | None) -> Pointer | None:
        self.pointer = pointer
        return pointer


def _pointer_at(url: str) -> Pointer | None:
    stored = read_pointer(url)
    return None if stored is None else stored.pointer


def _required(url: str, pointer: Pointer | None) -> Pointer:
    if pointer is None:
        names = f"{url} --as POINTER" if find_dataset(url) is not None else f"OUT --as {url}"
        raise JobError(f"{url} is no pointer. Check the path, or make one: vitray promote {names}")
    return pointer


def _require_place(dataset: Dataset, url: str) -> None:
    """Raises JobError for a pointer that would lie in a dataset, or that cannot name this one."""
    if is_local(dataset.out) and not is_local(url):
        raise JobError(
            f"--as {url}: other machines cannot read {dataset.out}. "
            "Choose a local path for the pointer, or a dataset on s3://."
        )
    if not is_local(url) and url.count("/") < 3:
        raise JobError(f"--as {url} is a bucket: add a name, such as {url}/current.")
    if dataset.out == url or find_dataset(url) is not None:
        raise JobError(f"--as {url} holds a dataset: choose another name for the pointer.")
    require_outside(dataset, "--as", url)
    if f"{dataset.out}/".startswith(f"{url}/"):
        raise JobError(f"--as {url} is a folder around the dataset: choose another name.")


def _found(version: Version) -> Dataset | None:
    """The dataset that was promoted; None where it is gone, or where another one is there now."""
    dataset = find_dataset(version.dataset)
    if dataset is None or dataset.fingerprint != version.fingerprint:
        return None
    return dataset


def _dataset_of(version: Version) -> Dataset:
    dataset = _found(version)
    if dataset is None:
        raise JobError(
            f"version {version.number} is gone: {version.dataset} does not hold the dataset that "
            "was promoted. Restore it, or choose another version by --to."
        )
    return dataset


def _change_of(url: str, old: Pointer | None, new: Pointer, dataset: Dataset) -> PointerChange:
    before = None if old is None or old.current == new.current else old.current_version
    previous = None if before is None else _found(before)
    return PointerChange(
        pointer=url,
        version=new.current,
        dataset=dataset.out,
        fingerprint=dataset.fingerprint,
        rows=_rows(dataset),
        complete=is_complete(dataset),
        changed=old != new,
        by=new.by,
        previous=None if before is None else before.number,
        previous_dataset=None if before is None else before.dataset,
        previous_fingerprint=None if before is None else before.fingerprint,
        previous_rows=None if previous is None else _rows(previous),
    )


def _rows(dataset: Dataset) -> int:
    return sum(row_counts(dataset).values())


def _retention(url: str, pointer: Pointer, doomed: tuple[Version, ...], deleted: bool) -> Retention:
    old = tuple(map(_old_version, doomed))
    return Retention(url, pointer.current, _kept(pointer, doomed), old, deleted)


def _kept(pointer: Pointer, doomed: tuple[Version, ...]) -> tuple[int, ...]:
    gone = {version.number for version in doomed}
    return tuple(
        version.number
        for version in pointer.versions
        if version.state is VersionState.KEPT and version.number not in gone
    )


def _old_version(version: Version) -> OldVersion:
    dataset = _found(version)
    if dataset is None:
        return OldVersion(version.number, version.dataset, 0, 0, (), gone=True)
    files = list_dataset_files(dataset)
    return OldVersion(
        version.number, version.dataset, len(files.own), files.size_bytes, files.others, gone=False
    )
