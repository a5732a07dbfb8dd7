"""Remove what no run of a dataset needs any more."""

from __future__ import annotations

from dataclasses import dataclass

from vitray.dataset import clean as clean_dataset
from vitray.dataset import require_dataset
from vitray.errors import count
from vitray.pipeline import list_source


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

    Raises JobError where there is no dataset, and SourceError where its source cannot be listed.
    """
    dataset = require_dataset(out)
    shards = [shard.id for shard in list_source(dataset.job, dataset.out).shards]
    return Cleaning(dataset.out, tuple(clean_dataset(dataset, shards)))
