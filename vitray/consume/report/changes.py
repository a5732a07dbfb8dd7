"""What the page of a comparison says: its figures, and pictures of rows whose label moved. Private
to this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vitray.consume.report.page import Page, listed
from vitray.consume.report.pictures import pictures_of, rows_of
from vitray.dataset import require_dataset
from vitray.html import rendered


class Moved(Protocol):
    """Images whose label went from `old` to `new`. refs: (shard, index) of some."""

    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def refs(self) -> Sequence[tuple[str, int]]: ...


class Changes(Protocol):
    """What `compare` found between the datasets `old` and `new`. None: there was nothing to
    compare.
    """

    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def only_old_rows(self) -> int: ...
    @property
    def only_new_rows(self) -> int: ...
    @property
    def only_old_shards(self) -> int: ...
    @property
    def only_new_shards(self) -> int: ...
    @property
    def agreement(self) -> float | None: ...
    @property
    def moves(self) -> Sequence[Moved]: ...
    @property
    def score_shift(self) -> float | None: ...
    @property
    def sample(self) -> int: ...
    @property
    def cka(self) -> float | None: ...
    @property
    def neighbours(self) -> float | None: ...


def changes_page(found: Changes) -> Page:
    """Equal shard ids are the same images, so that the source of the new dataset is that of
    both.
    """
    old, new = require_dataset(found.old), require_dataset(found.new)
    refs = [ref for move in found.moves for ref in move.refs]
    before, after = (
        rows_of(old, refs, ["label", "score"]),
        rows_of(new, refs, ["key", "content_hash", "label", "score"]),
    )
    shards, notes = listed(new) if refs else ({}, [])
    images, why = pictures_of(new, shards, after) if shards else ({}, [])

    def shown(ref: tuple[str, int]) -> dict[str, object]:
        return {
            "key": after[ref]["key"],
            "old": before[ref],
            "new": after[ref],
            "picture": images.get(ref),
        }

    html = rendered(
        "consume/report",
        "changes.html",
        maker="vitray compare",
        name=f"{old.out.rpartition('/')[2]} → {new.out.rpartition('/')[2]}",
        notes=notes + why,
        found=found,
        moves=[(move, [shown(ref) for ref in move.refs]) for move in found.moves],
        made_from="the two datasets' own files",
        holds_pictures=bool(images),
    )
    return Page(html, found.rows, len(images), tuple(notes + why))
