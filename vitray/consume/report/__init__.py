"""Show me: one HTML file of a dataset that needs nothing else, and a dataset card.

counts.py   one pass over the data files      space.py   where vectors lie, which are alike    pictures.py   from the source anew
page.py     what the page says                page.html  how it looks                          card.py       README.md of the dataset
changes.py  what the page of a comparison says, changes.html how it looks
"""

from __future__ import annotations

from dataclasses import dataclass

from vitray.consume.report.card import write_card
from vitray.consume.report.changes import Changes, changes_page
from vitray.consume.report.page import Page, page_of
from vitray.dataset import Dataset, data_files, require_dataset
from vitray.errors import JobError, ObjectMissing
from vitray.storage import absolute, store_for

__all__ = ["Report", "report", "report_changes", "write_card"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was written. pictures: of images of the source; notes: why there are not more, and what
    else the page could not tell.
    """

    page: str
    size_bytes: int
    images: int
    pictures: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        what = f"{self.images:,} images, {self.pictures} pictures, {self.size_bytes / 1e6:.1f} MB"
        return "\n".join([f"{self.page}: {what}", *(f"note       {note}" for note in self.notes)])


def report(
    out: str, to: str | None = None, truth: str | None = None, pictures: bool = True
) -> Report:
    """Write the page of a dataset, also of one that is not complete or whose source is gone.

    to: where; by default <name of out>-report.html in the current directory. A file there that is
    no report is not overwritten.
    truth: a passthrough column that holds the true label, for accuracy and calibration. pictures:
    read images of the source again.
    Raises JobError for what is no dataset, CommitError for a data file that cannot be read.
    """
    dataset = require_dataset(out)
    _require_truth(dataset, truth)
    target = absolute(to or f"{dataset.out.rpartition('/')[2]}-report.html")
    _require_ours(target, "report")
    return _written(page_of(dataset, data_files(dataset.out), truth, pictures), target, "report")


def report_changes(found: Changes, to: str) -> Report:
    """Write the page of a comparison: figures, moves, and pictures of rows that moved where the
    source still has them.

    to: where. A file there that is no page of a comparison is not overwritten: JobError.
    """
    target = absolute(to)
    _require_ours(target, "compare")
    return _written(changes_page(found), target, "compare")


def _written(page: Page, target: str, command: str) -> Report:
    body = page.html.encode()
    if not store_for(target).create(target, body):
        _require_ours(target, command)
        store_for(target).replace(target, body)
    return Report(target, len(body), page.images, page.pictures, page.notes)


def _require_truth(dataset: Dataset, truth: str | None) -> None:
    if truth is not None and (truth not in dataset.passthrough.names or not dataset.job.labelled):
        has = ", ".join(dataset.passthrough.names) or "none: set `keep` in a job with another `out`"
        raise JobError(
            f"--truth {truth}: no passthrough column of a dataset with labels is called so. "
            f"Passthrough columns: {has}."
        )


def _require_ours(target: str, command: str) -> None:
    try:
        with store_for(target).open(target) as stream:
            head = stream.read(1000)
    except ObjectMissing:
        return
    if f'<meta name="generator" content="vitray {command} '.encode() not in head:
        raise JobError(
            f"{target} exists and was not made by vitray {command}. Choose another file, or move "
            f"it away."
        )
