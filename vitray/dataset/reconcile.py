"""What the manifest step does with each data file: a pure decision, without any input or output."""

from __future__ import annotations

from collections.abc import Collection, Container
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import StrEnum

from vitray.dataset.layout import base_of


class FileState(StrEnum):
    """The state of a data file in the manifest, as it is stored."""

    CURRENT = "current"  # of a listed shard
    OUTDATED = "outdated"  # of an older version, until the newer one is committed
    GONE = "gone"  # its input is no longer listed in any version


@dataclass(frozen=True, slots=True)
class Actions:
    """What to do with the data files of a dataset.

    unlisted: committed by another run after the listing began. If there are any, list again.
    delete: superseded files and, with prune, files whose input is gone. pruned: the latter.
    admit: the files of the manifest, each with its state.
    pending: planned shards without a data file.
    """

    unlisted: frozenset[str]
    delete: frozenset[str]
    pruned: frozenset[str]
    admit: dict[str, FileState]
    pending: frozenset[str]

    @property
    def gone(self) -> int:
        """How many admitted files have no input any more."""
        return sum(state is FileState.GONE for state in self.admit.values())


def reconcile(
    listed: Collection[str],
    planned: Collection[str],
    existing: AbstractSet[str],
    seen: AbstractSet[str],
    prune: bool,
    agreed: Container[str] | None = None,
) -> Actions:
    """The actions for the shards of a source and the data files of a dataset, all as shard ids.

    listed: every shard of the source; planned: those that `limit` and the like leave.
    existing: the data files after the listing; seen: those before it. Only a file that was seen
    may be deleted: the listing is older than any other. agreed: with prune, the only files that may
    be deleted because their input is gone; None for all.
    """
    current = set(listed)
    listed_bases = {base_of(shard) for shard in current}
    uncommitted_bases = {base_of(shard) for shard in current - existing}
    admit = dict[str, FileState]()
    delete = set[str]()
    for shard in existing:
        base = base_of(shard)
        if shard in current:
            admit[shard] = FileState.CURRENT
        elif base in uncommitted_bases:
            admit[shard] = FileState.OUTDATED
        elif base not in listed_bases and not (
            prune and shard in seen and (agreed is None or shard in agreed)
        ):
            admit[shard] = FileState.GONE
        elif shard in seen:
            delete.add(shard)
    return Actions(
        unlisted=frozenset(existing - seen - current),
        delete=frozenset(delete),
        pruned=frozenset(shard for shard in delete if base_of(shard) not in listed_bases),
        admit=admit,
        pending=frozenset(set(planned) - existing),
    )
