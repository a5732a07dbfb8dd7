"""What a label is as text, and tables that join labels to images by key."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset import read_table
from vitray.errors import JobError, ObjectMissing, one_line
from vitray.storage import read as read_object
from vitray.storage import store_for
from vitray.training.config import TrainingConfig


def text_of(value: object, config: TrainingConfig) -> str | None:
    """A label or a key as text; None for nothing, also as NaN or as spaces. Raises JobError for a
    list and the like.
    """
    if isinstance(value, list | dict):
        raise JobError(
            f"{str(value)[:60]} is no label ({config.label_place}). Correct `label`, or set "
            f"`label_field` where it is JSON."
        )
    if value is None or value != value:
        return None
    return _decoded(value).strip() or None


def _decoded(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def field_of(value: object, name: str) -> object:
    """A field of JSON text, or of a record; None where there is none."""
    try:
        record = json.loads(_decoded(value)) if isinstance(value, str | bytes) else value
    except ValueError:
        return None
    return record.get(name) if isinstance(record, dict) else None


def labels_by_key(config: TrainingConfig) -> dict[str, str] | None:
    """Labels by key out of label_table. Raises JobError for a table or a column that is not there,
    or two labels of one key.
    """
    if config.label_table is None:
        return None
    names = [config.table_key, config.label_at]
    try:
        if config.label_table.lower().endswith(".parquet"):
            with store_for(config.label_table).open(config.label_table) as stream:
                known = pq.ParquetFile(stream, pre_buffer=False).schema_arrow.names
                rows: Iterable[dict[str, Any]] = read_table(stream, names).to_pylist()
        else:
            rows = csv.DictReader(io.StringIO(read_object(config.label_table).decode("utf-8-sig")))
            known = list(rows.fieldnames or ())
        if lacking := [name for name in names if name not in known]:
            raise JobError(
                f"label_table {config.label_table} has no column `{lacking[0]}`; it has "
                f"{', '.join(known[:20]) or 'none'}. "
                "Correct `label_table`, `table_key` or `label`."
            )
        labels = dict[str, str]()
        for row in rows:
            key, label = (text_of(row[name], config) for name in names)
            if key and label and labels.setdefault(key, label) != label:
                raise JobError(
                    f"label_table {config.label_table} gives {key} two labels, {labels[key]} and "
                    f"{label}. Keep one of them."
                )
        return labels
    except ObjectMissing as error:
        raise JobError(
            f"label_table {config.label_table} is not there. Correct `label_table`."
        ) from error
    except (ValueError, pa.ArrowException, csv.Error) as error:
        what = (
            f"label_table {config.label_table} cannot be read as CSV or Parquet with the columns "
            f"{' and '.join(names)}"
        )
        raise JobError(
            f"{what} ({one_line(error)}). Correct `label_table`, `table_key` or `label`."
        ) from error
