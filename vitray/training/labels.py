"""Labels: their text, tables that join them to images by key, and the classes that they name."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset import read_table
from vitray.errors import JobError, ObjectMissing, count, one_line
from vitray.storage import read as read_object
from vitray.storage import store_for
from vitray.training.config import TrainingConfig

CLASS_CHARS = 500  # longer labels are captions, or the bytes of an image
KEYS_SHOWN = 3  # in a message
COLUMNS_SHOWN = 20


def text_of(value: object, config: TrainingConfig) -> str | None:
    """A label or a key as text; None for nothing, NaN and spaces. Raises JobError for a list."""
    if isinstance(value, list | dict):
        raise JobError(
            f"{str(value)[:60]} is not a label ({config.label_location}). "
            "Correct `label`, or set `label_field` if it is JSON."
        )
    is_nan = isinstance(value, float | np.floating) and math.isnan(value)
    if value is None or is_nan:
        return None
    return _decoded(value).strip() or None


def _decoded(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def field_of(value: object, name: str) -> object:
    """A field of a record, or of JSON text; None if there is none."""
    try:
        record = json.loads(_decoded(value)) if isinstance(value, str | bytes) else value
    except ValueError:
        return None
    return record.get(name) if isinstance(record, dict) else None


def labels_by_key(config: TrainingConfig) -> dict[str, str] | None:
    """The labels of label_table by key; None without a table.

    Raises JobError if the table or a column is missing, or if a key has two labels.
    """
    if config.label_table is None:
        return None
    columns = [config.table_key, config.label_column]
    try:
        return _labels_of(_table_rows(config.label_table, columns), config)
    except ObjectMissing as error:
        raise JobError(
            f"label_table {config.label_table} does not exist. Correct `label_table`."
        ) from error
    except (ValueError, pa.ArrowException, csv.Error) as error:
        raise JobError(
            f"label_table {config.label_table} cannot be read as CSV "
            f"or Parquet with the columns {' and '.join(columns)} ({one_line(error)}). "
            "Correct `label_table`, `table_key` or `label`."
        ) from error


def _table_rows(url: str, columns: list[str]) -> Iterable[dict[str, Any]]:
    """Rows of a CSV or Parquet file. Raises JobError for a column that it does not have."""
    if url.lower().endswith(".parquet"):
        with store_for(url).open(url) as stream:
            _require_columns(
                url, columns, pq.ParquetFile(stream, pre_buffer=False).schema_arrow.names
            )
            return list(read_table(stream, columns).to_pylist())
    reader = csv.DictReader(io.StringIO(read_object(url).decode("utf-8-sig")))
    _require_columns(url, columns, list(reader.fieldnames or ()))
    return reader


def _require_columns(url: str, columns: list[str], existing: list[str]) -> None:
    missing = next((name for name in columns if name not in existing), None)
    if missing is not None:
        raise JobError(
            f"label_table {url} has no column `{missing}`; "
            f"it has {', '.join(existing[:COLUMNS_SHOWN]) or 'none'}. "
            "Correct `label_table`, `table_key` or `label`."
        )


def _labels_of(rows: Iterable[dict[str, Any]], config: TrainingConfig) -> dict[str, str]:
    labels: dict[str, str] = {}
    for row in rows:
        key = text_of(row[config.table_key], config)
        label = text_of(row[config.label_column], config)
        if not key or not label:
            continue
        if labels.setdefault(key, label) != label:
            raise JobError(
                f"label_table {config.label_table} gives {key} two labels, {labels[key]} and "
                f"{label}. Keep one of them."
            )
    return labels


def choose_classes(
    config: TrainingConfig, labels: set[str], teacher_classes: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The classes in their order: of the config, else of the teacher, else the labels, sorted.

    Raises JobError for fewer than two.
    """
    if caption := next((name for name in sorted(labels) if len(name) > CLASS_CHARS), None):
        raise JobError(
            f"a label of {len(caption):,} characters cannot be a class name: {caption[:40]}… "
            f"Correct `label` ({config.label_location})."
        )
    classes = tuple(config.classes) or teacher_classes or tuple(sorted(labels, key=_numbers_first))
    if len(labels) < 2 or len(classes) < 2:
        raise JobError(
            f"the images have {len(labels)} class ({', '.join(sorted(labels)) or 'no label'}); "
            "a classifier needs two. Correct `source` or `label`."
        )
    return classes


def _numbers_first(label: str) -> tuple[bool, int, str]:
    """Sorts numbers by size, before all other labels."""
    is_number = label.isdecimal()
    return (not is_number, int(label) if is_number else 0, label)


def class_ids(pairs: Sequence[tuple[str, str]], classes: tuple[str, ...]) -> np.ndarray:
    """int64 [N]: the class of each (key, label) pair. Raises JobError for a label that is none.

    If no class is called a number, a number is the id of a class.
    """
    ids = {name: n for n, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        ids |= {str(n): n for n in range(len(classes))}
    if unknown := [f"{label} of {key}" for key, label in pairs if label not in ids]:
        raise JobError(
            f"not among the {count(len(classes), 'class')}: {count(len(unknown), 'label')}, such "
            f"as {', '.join(unknown[:KEYS_SHOWN])}. Correct `classes`."
        )
    return np.array([ids[label] for _, label in pairs], np.int64)


def require_labels(config: TrainingConfig, pairs: Sequence[tuple[str, str | None]]) -> None:
    """Raises JobError for (key, label) pairs without a label, unless the config skips those.

    Also raises it for a label_table that has none of the keys.
    """
    unlabelled = [key for key, label in pairs if label is None]
    if config.label_table and len(unlabelled) == len(pairs) > 0:
        table_keys = list(labels_by_key(config) or ())[:KEYS_SHOWN]
        raise JobError(
            f"label_table {config.label_table} names none of {count(len(pairs), 'image')}: its "
            f"{config.table_key} holds {', '.join(table_keys) or 'nothing'}, the images are "
            f"{', '.join(unlabelled[:KEYS_SHOWN])}. Correct `label_table` or `table_key`."
        )
    if unlabelled and config.unlabelled == "refuse":
        fields = "`label`, `label_table` or `table_key`" if config.label_table else "`label`"
        raise JobError(
            f"{count(len(unlabelled), 'image')} without a label ({config.label_location}), such as "
            f"{', '.join(unlabelled[:KEYS_SHOWN])}. Correct {fields}, or set unlabelled: skip."
        )


def require_both_sides(config: TrainingConfig, train: np.ndarray, held_out: np.ndarray) -> None:
    """Raises JobError if the split leaves one class to train on, or no image to hold out."""
    if len(np.unique(train)) < 2:
        raise JobError(
            "the images that are not held out have one class only. Give more images, or a smaller "
            "`validation`."
        )
    if config.validation and len(held_out) == 0:
        raise JobError(
            "no image fell into the held-out share. Set a larger `validation`, or 0 to train "
            "without held-out images."
        )
