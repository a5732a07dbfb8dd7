"""Reports: one self-contained HTML file of a dataset or of a comparison, and a dataset card.

counts.py    sums from one pass over the data files     page.py      content of page.html
truth.py     the true labels                            changes.py   content of changes.html
space.py     map of the vectors, groups of near ones    card.py      the dataset card
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitray.consume.report.card import write_card
from vitray.consume.report.changes import changes_page
from vitray.consume.report.page import Page, page_of
from vitray.consume.report.truth import true_labels
from vitray.dataset import data_files, require_dataset
from vitray.errors import JobError, ObjectMissing, count
from vitray.storage import absolute, store_for

if TYPE_CHECKING:
    from vitray.consume.comparing import Comparison

__all__ = ["Report", "report", "report_changes", "write_card"]


@dataclass(frozen=True, slots=True)
class Report:
    """The file that was written.

    pictures: how many the page shows. notes: why it does not show more, and what else it lacks.
    """

    page: str
    size_bytes: int
    images: int
    pictures: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        content = f"{count(self.images, 'image')}, {count(self.pictures, 'picture')}"
        size = f"{self.size_bytes / 1e6:.1f} MB"
        return "\n".join(
            [f"{self.page}: {content}, {size}", *(f"note       {note}" for note in self.notes)]
        )


def report(
    out: str, to: str | None = None, truth: str | None = None, pictures: bool = True
) -> Report:
    """Write the page of a dataset. It may be incomplete, and its source may be gone.

    to: the path of the page; by default <name of out>-report.html in the current directory. A file
    that is not a report is not overwritten.
    truth: the true labels, for accuracy and calibration: a passthrough column, `folder`, or the
    path of a CSV file with the columns key and label.
    pictures: whether to read images of the source again.

    Raises JobError for a directory without a dataset and for true labels that fit none of its
    images, CommitError for an unreadable data file.
    """
    dataset = require_dataset(out)
    target = absolute(to or f"{dataset.out.rpartition('/')[2]}-report.html")
    _require_ours(target, "report")
    labels = true_labels(dataset, truth) if truth is not None else None
    return _written(page_of(dataset, data_files(dataset.out), labels, pictures), target, "report")


def report_changes(changes: Comparison, to: str) -> Report:
    """Write the page of a comparison: figures, changed labels, and pictures that the source has.

    to: the path of the page. Raises JobError for a file that is not the page of a comparison.
    """
    target = absolute(to)
    _require_ours(target, "compare")
    return _written(changes_page(changes), target, "compare")


def _written(page: Page, target: str, command: str) -> Report:
    body = page.html.encode()
    if not store_for(target).create(target, body):
        _require_ours(target, command)
        store_for(target).replace(target, body)
    return Report(target, len(body), page.images, page.pictures, page.notes)


def _require_ours(target: str, command: str) -> None:
    """Raises JobError for an existing file that this command did not make."""
    try:
        with store_for(target).open(target) as stream:
            head = stream.read(1000)
    except ObjectMissing:
        return
    if f'<meta name="generator" content="vitray {command} '.encode() not in head:
        raise JobError(
            f"{target} exists and was not made by vitray {command}. "
            "Choose another file, or move it away."
        )
