"""Remove what no run of a dataset needs any more."""

from __future__ import annotations

from dataclasses import dataclass

from vitray.dataset import Dataset, find_dataset, read_pointer, require_dataset
from vitray.dataset import clean as clean_dataset
from vitray.errors import JobError, count
from vitray.pipeline import list_source
from vitray.storage import absolute


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What was removed: ids of shards whose staging it was, and names of other files in `out`."""

    out: str
    removed: tuple[str, ...]

    def __str__(self) -> str:
        if not self.removed:
            return f"{self.out}: nothing to delete"
        return "\n".join([*self.removed, f"deleted {count(len(self.removed), 'item')}"])


def clean(out: str) -> Cleaning:
    """Remove staging that no run needs, and the files of commands that were killed.

    Raises JobError where there is no dataset or a pointer, and SourceError where its source cannot
    be listed.
    """
    dataset = find_dataset(out) or _refuse(out)
    shards = [shard.id for shard in list_source(dataset.job, dataset.out).shards]
    return Cleaning(dataset.out, tuple(clean_dataset(dataset, shards)))


def _refuse(out: str) -> Dataset:
    """Raises JobError: there is a pointer, or nothing."""
    stored = read_pointer(out)
    if stored is None:
        return require_dataset(out, follow=False)
    current = stored.pointer.current_version
    raise JobError(
        f"{absolute(out)} is a pointer to {current.dataset} (version {current.number}): name that "
        "directory to clean it, or add --keep-versions N to delete older versions."
    )
