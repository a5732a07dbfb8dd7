"""True labels of a dataset's rows: a passthrough column, the folders of the images, or a CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vitray.dataset import Dataset, data_files, read_footer, read_table
from vitray.errors import JobError, ObjectMissing, count, one_line
from vitray.job import expand_home
from vitray.storage import read, store_for

FOLDER = "folder"
TABLE_SUFFIXES = (".csv", ".tsv")
TABLE_COLUMNS = ("key", "label")
DELIMITERS = (",", ";", "\t")
SHOWN = 3  # keys in a message
GIVE = (
    "Give --truth a passthrough column, `folder` for the folders of the images, or a CSV file with "
    "the columns key and label."
)


class TrueLabels(Protocol):
    """Where the true label of each row is.

    column: of the dataset, which `label_of` reads. name: for the page.
    """

    @property
    def name(self) -> str: ...
    @property
    def column(self) -> str: ...
    def label_of(self, value: object) -> str:
        """The true label of a row with this value of `column`; empty if it has none."""
        ...

    def notes(self) -> list[str]:
        """What did not fit, for the page and the command's output."""
        ...


@dataclass(frozen=True)
class ColumnLabels:
    """A passthrough column that holds the true labels."""

    name: str

    @property
    def column(self) -> str:
        return self.name

    def label_of(self, value: object) -> str:
        return text_of(value)

    def notes(self) -> list[str]:
        return []


@dataclass(frozen=True)
class FolderLabels:
    """The name of the folder in an image's key: `cat` for photos/cat/1.jpg."""

    name: str = FOLDER
    column: str = "key"

    def label_of(self, value: object) -> str:
        return text_of(value).rpartition("/")[0].rpartition("/")[2]

    def notes(self) -> list[str]:
        return []


@dataclass(frozen=True)
class TableLabels:
    """A table of labels by key. matches: how many images each of its keys names."""

    name: str
    labels: Mapping[str, str]
    matches: Counter[str] = field(default_factory=Counter)
    column: str = "key"

    def label_of(self, value: object) -> str:
        key = text_of(value)
        name = matching_name(key, self.labels)
        if name is None or (name != key and self.matches[name] > 1):
            return ""
        return self.labels[name]

    def notes(self) -> list[str]:
        unused = [key for key in self.labels if not self.matches[key]]
        repeated = [key for key, images in self.matches.items() if images > 1]
        notes = []
        if unused:
            verb = "names" if len(unused) == 1 else "name"
            notes.append(
                f"{count(len(unused), 'key')} of {self.name} {verb} no image of this dataset, such "
                f"as {_some(unused)}."
            )
        if repeated:
            verb = "names" if len(repeated) == 1 else "name"
            notes.append(
                f"{count(len(repeated), 'key')} of {self.name} {verb} several images, such as "
                f"{_some(repeated)}: write more of their paths."
            )
        return notes


def true_labels(dataset: Dataset, truth: str) -> TrueLabels:
    """The true labels that --truth names. A passthrough column of that name comes first.

    Raises JobError for a dataset without labels, for a name that is none of these, for a table that
    cannot be used, and for one that has none of the dataset's images.
    """
    if not dataset.job.labelled:
        raise JobError(f"--truth {truth}: {dataset.out} has no labels to compare it with.")
    if truth in dataset.passthrough.names:
        return ColumnLabels(truth)
    if truth == FOLDER:
        labels = FolderLabels()
        if any(labels.label_of(key) for key in _keys(dataset)):
            return labels
        raise JobError(
            "--truth folder: no key of this dataset has a folder. Set `keep: folder` in a job with "
            "another `out`, or give a CSV file with the columns key and label."
        )
    if truth.lower().endswith(TABLE_SUFFIXES):
        return _table_labels(dataset, truth)
    names = ", ".join(dataset.passthrough.names) or "none"
    raise JobError(
        f"--truth {truth}: there is no passthrough column of that name. Passthrough columns: "
        f"{names}. {GIVE}"
    )


def text_of(value: object) -> str:
    """A passthrough value as text, empty for null; members of a tar can be bytes."""
    if value is None:
        return ""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip()


def matching_name(key: str, names: Mapping[str, Any]) -> str | None:
    """The key itself, or the longest end of its path that is among the names; None for none."""
    end = key
    while end not in names:
        _, slash, end = end.partition("/")
        if not slash:
            return None
    return end


def _table_labels(dataset: Dataset, truth: str) -> TableLabels:
    table = TableLabels(truth, _read_table(truth))
    first_keys = list[str]()
    for key in _keys(dataset):
        if len(first_keys) < SHOWN:
            first_keys.append(key)
        if (name := matching_name(key, table.labels)) is not None:
            table.matches[name] += 1
    if not table.matches:
        raise JobError(
            f"--truth {truth} names none of the images: its keys are {_some(table.labels)}, those "
            f"of the dataset {_some(first_keys)}. Write keys, ends of their paths, or file names."
        )
    return table


def _keys(dataset: Dataset) -> Iterable[str]:
    """The keys of all images, good and bad."""
    for url in data_files(dataset.out):
        with store_for(url).open(url) as stream:
            yield from read_table(stream, ["key"])["key"].to_pylist()
        yield from read_footer(url).error_rows["key"].to_pylist()


def _read_table(path: str) -> dict[str, str]:
    """Labels by key. Raises JobError."""
    try:
        text = read(expand_home(path)).decode("utf-8-sig")
        rows = labels_of(path, text)
    except ObjectMissing as error:
        raise JobError(f"--truth {path} does not exist. {GIVE}") from error
    except (ValueError, csv.Error) as error:
        raise JobError(
            f"--truth {path} cannot be read as CSV in UTF-8: {one_line(error)}. {GIVE}"
        ) from error
    if not rows:
        raise JobError(f"--truth {path} holds no label. {GIVE}")
    return rows


def labels_of(path: str, text: str) -> dict[str, str]:
    """Labels by key, of the text of a table. Rows without a key or a label are left out.

    path: for messages. Raises JobError for missing columns, and for a key with two labels.
    """
    reader = next(
        (
            reader
            for delimiter in DELIMITERS
            if set(TABLE_COLUMNS) <= set((reader := _reader(text, delimiter)).fieldnames or ())
        ),
        None,
    )
    if reader is None:
        columns = ", ".join(_reader(text, DELIMITERS[0]).fieldnames or ()) or "none"
        raise JobError(
            f"--truth {path} needs the columns key and label in its first line; it has {columns}."
        )
    labels = dict[str, str]()
    for row in reader:
        key, label = (text_of(row[name]) for name in TABLE_COLUMNS)
        if key and label and labels.setdefault(key, label) != label:
            raise JobError(
                f"--truth {path} gives {key} two labels, {labels[key]} and {label}. "
                "Keep one of them."
            )
    return labels


def _reader(text: str, delimiter: str) -> csv.DictReader[str]:
    return csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)


def _some(keys: Iterable[str]) -> str:
    shown: Sequence[str] = [key for key, _ in zip(keys, range(SHOWN))]
    return ", ".join(shown)
