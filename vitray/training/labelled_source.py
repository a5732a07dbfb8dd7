"""The labelled images of a TrainingConfig: of its source, its dataset, or its teacher's dataset."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from vitray.dataset import Dataset, read, read_errors, require_complete, require_outside
from vitray.errors import JobError, count
from vitray.pipeline import list_source, prepare_job
from vitray.schema import Encoded, Shard, ShardKind, short_hash
from vitray.sources import file_passthrough_schema, list_shards, python_value, read_shard
from vitray.storage import absolute
from vitray.training.config import TrainingConfig
from vitray.training.labels import KEYS_SHOWN, field_of, labels_by_key, text_of
from vitray.training.out_folder import is_begun

log = logging.getLogger(__name__)
ImageId = tuple[str, int]  # shard and index: keys may repeat


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """key: the path below the source, which survives a move. label: None if it has none."""

    key: str
    label: str | None
    image: Encoded


@dataclass(frozen=True, slots=True)
class LabelledVectors:
    """What a linear probe learns from.

    pairs: (key, label) of each row, None for no label. images: where each row is. vectors: one a
    row. undecodable: key, reason and message of the dataset's bad images.
    """

    pairs: list[tuple[str, str | None]]
    images: list[ImageId]
    vectors: pa.ChunkedArray
    undecodable: list[dict[str, str]]


class LabelledSource:
    """Images and labels, whichever fields of the config name them.

    Raises JobError for a dataset that is not complete, and for a label column that does not exist.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.dataset = require_complete(config.from_dataset) if config.from_dataset else None
        self.job = prepare_job(self.dataset.job if self.dataset else config.source_job())
        if self.dataset:
            require_outside(self.dataset, "`out`", absolute(config.out))
        self.bases = [
            re.split(r"[*?\[{]", pattern)[0].rpartition("/")[0] for pattern in self.job.source
        ]
        self.bases += self.job.source
        self.table = labels_by_key(config)
        self.image_of_table_key: dict[str, ImageId] = {}
        if self.dataset:
            self._require_dataset_column(self.dataset)
        else:
            self._require_source_column()

    def _require_source_column(self) -> None:
        shard = self.shards[0]
        if self.job.keep and shard.kind is ShardKind.FILES:
            raise JobError(
                f"label: {self.config.label_column}: loose files have no columns. "
                "Set label: folder, or give a label_table."
            )
        file_passthrough_schema(shard, self.job)  # raises JobError for a missing column

    def _require_dataset_column(self, dataset: Dataset) -> None:
        if self._is_label_missing():
            raise JobError(_missing_label(dataset))
        columns = [*dataset.schema.names, "folder"]
        if self.table is None and self.config.label_column not in columns:
            raise JobError(
                f"{dataset.out} has no column `{self.config.label_column}`. `label` may be one of "
                f"{', '.join(columns)}."
            )

    def _is_label_missing(self) -> bool:
        """Whether a training on a dataset would silently learn the labels of the dataset's model.

        A teacher's labels are what its student learns.
        """
        config = self.config
        has_label = config.label or config.label_table or config.teacher or config.teacher_model
        return not has_label and not is_begun(config.out)

    @cached_property
    def shards(self) -> list[Shard]:
        """Listed on first use: a linear probe on stored embeddings needs none."""
        if self.dataset:
            return list_source(self.job, self.dataset.out).shards
        return list_shards(self.job, ()).shards

    def identity(self) -> dict[str, object]:
        """JSON values that change if the images or their labels do."""
        table = None if self.table is None else short_hash(repr(sorted(self.table.items())))
        return {
            "shards": [shard.id for shard in self.shards],
            "dataset": self.dataset.fingerprint if self.dataset else None,
            "label_table": table,
        }

    def undecodable(self) -> list[dict[str, str]]:
        """key, reason and message of the images that the dataset could not decode."""
        if self.dataset is None:
            return []
        rows = read_errors(self.dataset).select(["key", "reason", "message"]).to_pylist()
        return [{**row, "key": self.short(row["key"])} for row in rows]

    def images(self) -> Iterator[LabelledImage]:
        """All images that are used, with their labels. Warns of shards that are cut short."""
        for shard, values in self._shards_with_labels():
            is_used = _every_index if values is None else values.__contains__
            for item in read_shard(shard, self.job, is_used):
                if isinstance(item, Encoded):
                    value = _passthrough_value(item) if values is None else values[item.index]
                    label = self.label_of(item.key, value, (shard.id, item.index))
                    yield LabelledImage(self.short(item.key), label, item)
                elif item.truncated_at is not None:
                    log.warning(
                        "%s is cut short at byte %d: its %d images are used",
                        shard.url,
                        item.truncated_at,
                        item.total,
                    )
        self._warn_of_unused_keys()

    def vectors(self, column: str) -> LabelledVectors:
        """The dataset's stored embeddings with their labels; no image is read."""
        table = self._dataset_rows([column])
        images = list(zip(table["shard"].to_pylist(), table["index"].to_pylist()))
        rows = zip(table["key"].to_pylist(), self._label_values(table), images)
        pairs = [(self.short(key), self.label_of(key, value, image)) for key, value, image in rows]
        self._warn_of_unused_keys()
        return LabelledVectors(pairs, images, table[column], self.undecodable())

    def _dataset_rows(self, columns: list[str]) -> pa.Table:
        """The dataset's rows whose score is at least min_score."""
        assert self.dataset is not None
        optional = [
            name
            for name in (self.config.label_column, "score")
            if name in self.dataset.schema.names
        ]
        names = ["key", "shard", "index", "content_hash", *columns, *optional]
        table = read(self.dataset.out, list(dict.fromkeys(names)))
        # no filter without min_score: scores of a regression may be negative
        if "score" in table.column_names and self.config.min_score:
            table = table.filter(pa.array(table["score"].to_numpy() >= self.config.min_score))
        return table

    def _label_values(self, table: pa.Table) -> list[object]:
        """The value of the label column in each row; None for each if there is no such column."""
        name = self.config.label_column
        return table[name].to_pylist() if name in table.column_names else [None] * len(table)

    def _shards_with_labels(self) -> Iterator[tuple[Shard, dict[int, object] | None]]:
        """Each shard; of a dataset with the label value of each row that is used, by index.

        Raises JobError if images of the dataset are no longer in its source.
        """
        if self.dataset is None:
            yield from ((shard, None) for shard in self.shards)
            return
        table = self._dataset_rows([])
        values: dict[str, dict[int, object]] = {}
        for shard_id, index, value in zip(
            table["shard"].to_pylist(), table["index"].to_pylist(), self._label_values(table)
        ):
            values.setdefault(shard_id, {})[index] = value
        if missing := values.keys() - {shard.id for shard in self.shards}:
            rows = sum(len(values[shard]) for shard in missing)
            raise JobError(
                f"{rows:,} of {count(len(table), 'image')} of {self.dataset.out} are no longer "
                f"where they were labelled: {len(missing)} of its shards changed or are gone. "
                "Run its job again (vitray run --prune, if they are gone), then this one."
            )
        yield from ((shard, values.get(shard.id, {})) for shard in self.shards)

    def short(self, key: str) -> str:
        """The key below the source."""
        below = (key[len(base) + 1 :] for base in self.bases if key.startswith(f"{base}/"))
        return min(below, key=len, default=key)

    def label_of(self, key: str, value: object, image: ImageId) -> str | None:
        """The label as text, None for no label. value: that of the label column."""
        if self.table is not None:
            label: object = self._label_in_table(self.table, key, image)
        elif self.config.label_column == "folder" and value is None:
            label = key.rpartition("/")[0].rpartition("/")[2]
        else:
            label = value
        if self.config.label_field is not None and label is not None:
            label = field_of(label, self.config.label_field)
        return text_of(label, self.config)

    def _label_in_table(self, table: dict[str, str], key: str, image: ImageId) -> str | None:
        """The label of the whole key, of the key below the source, or of the file name.

        Raises JobError if a row would label two images.
        """
        names = (key, self.short(key), key.rpartition("/")[2])
        name = next((name for name in names if name in table), None)
        if name is None:
            return None
        if self.image_of_table_key.setdefault(name, image) != image:
            raise JobError(
                f"label_table {self.config.label_table} has one row for {name}, "
                f"and several images have that name, such as {key}. "
                "Write whole keys; if images share a key, set another key_column."
            )
        return table[name]

    def _warn_of_unused_keys(self) -> None:
        """Warn of keys of label_table that name no image. If none does, an error follows later."""
        table = self.table or {}
        unused = [key for key in table if key not in self.image_of_table_key]
        if unused and self.image_of_table_key:
            log.warning(
                "%s of %s keys of label_table %s name no image, such as %s",
                f"{len(unused):,}",
                f"{len(table):,}",
                self.config.label_table,
                ", ".join(unused[:KEYS_SHOWN]),
            )


def _missing_label(dataset: Dataset) -> str:
    names = ", ".join(f"`{name}`" for name in dataset.passthrough.names)
    columns = (
        f"The passthrough columns of {dataset.out} are {names}."
        if names
        else f"{dataset.out} has no passthrough columns."
    )
    return (
        f"`label` is missing: the column with the true labels. {columns} `label: folder` takes the "
        "names of the images' folders, and label_table a CSV file. To learn the labels that the "
        "dataset's own model chose, set `label: label`."
    )


def _every_index(_index: int) -> bool:
    return True


def _passthrough_value(item: Encoded) -> object:
    """The image's value of the label column, which is its only passthrough column."""
    if item.passthrough is None:
        return None
    return python_value(item.passthrough.batch.column(0)[item.passthrough.row])
