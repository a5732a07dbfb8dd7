"""The content of the page of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitray.consume.report.page import Page, listed_shards
from vitray.dataset import require_dataset
from vitray.evaluation.pictures import pictures_of, rows_of
from vitray.html import rendered

if TYPE_CHECKING:
    from vitray.consume.comparing import Comparison


def changes_page(changes: Comparison) -> Page:
    """The page of a comparison. Equal shard ids are the same images: the new source is of both."""
    old, new = require_dataset(changes.old), require_dataset(changes.new)
    refs = [ref for move in changes.moves for ref in move.refs]
    old_rows = rows_of(old, refs, ["label", "score"])
    new_rows = rows_of(new, refs, ["key", "content_hash", "label", "score"])
    shards, notes = listed_shards(new) if refs else ({}, [])
    if shards:
        images, picture_notes = pictures_of(new, shards, new_rows)
        notes += picture_notes
    else:
        images = {}

    def card(ref: tuple[str, int]) -> dict[str, object]:
        return {
            "key": new_rows[ref]["key"],
            "old": old_rows[ref],
            "new": new_rows[ref],
            "picture": images.get(ref),
        }

    html = rendered(
        "consume/report",
        "changes.html",
        maker="vitray compare",
        name=f"{old.out.rpartition('/')[2]} → {new.out.rpartition('/')[2]}",
        notes=notes,
        changes=changes,
        moves=[(move, [card(ref) for ref in move.refs]) for move in changes.moves],
        made_from="the two datasets' own files",
        holds_pictures=bool(images),
    )
    return Page(html, changes.rows, len(images), tuple(notes))
