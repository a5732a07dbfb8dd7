"""Delete chosen data files, so that the next run makes them again."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vitray.dataset import delete_data_files, require_dataset, shards_to_redo
from vitray.errors import count


@dataclass(frozen=True, slots=True)
class Redo:
    """The data files that were chosen.

    shards: their ids. deleted: whether the files were deleted; otherwise they are only listed.
    """

    out: str
    shards: tuple[str, ...]
    deleted: bool

    def __str__(self) -> str:
        files = count(len(self.shards), "data file")
        if not self.shards:
            end = f"{self.out}: no data file has such an error; nothing to redo"
        elif self.deleted:
            end = f"deleted {files}; run the job again to recreate them"
        else:
            end = f"{files} would be deleted; add --yes to do it"
        return "\n".join([*self.shards, end])


def redo(out: str, shards: Collection[str], reasons: Collection[str], *, delete: bool) -> Redo:
    """Delete the data files of these shards, and of all others with an error of these reasons.

    delete: False only lists them. Raises JobError for a shard without a data file, and where there
    is no dataset. A pointer is not followed.
    """
    dataset = require_dataset(out, follow=False)
    chosen = shards_to_redo(dataset, shards, reasons)
    if delete and chosen:
        delete_data_files(dataset, chosen)
    return Redo(dataset.out, tuple(chosen), deleted=delete and bool(chosen))
