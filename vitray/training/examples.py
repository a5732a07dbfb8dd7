"""Labelled images of a config, decoded once: uint8 pixels and rows in a folder of this machine.

Training images are kept larger than the model takes them where they are cropped at random, held-out
ones as its processor makes them. What is held out follows from an image's key alone, so it stays
held out while the data grows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import ceil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset import read, read_errors, read_table, require_complete, require_outside
from vitray.decoding.decode import decode
from vitray.errors import JobError, StorageError, count, one_line
from vitray.pipeline import list_source, prepared
from vitray.schema import DecodeSpec, Encoded, PixelSpec, Shard, content_hash, short_hash
from vitray.sources import file_passthrough_schema, list_shards, python_value, read_shard
from vitray.storage import absolute, is_local, join, store_for
from vitray.training.config import TrainingConfig
from vitray.training.labels import field_of, labels_by_key, text_of

log = logging.getLogger(__name__)
MARGIN = 1.15  # side of what is kept for random crops, against what the model takes
CHUNK = 64  # images decoded by one call
NO_LABEL = "no_label"
TEXTS = ("key", "label", "reason", "message")
ROWS = pa.schema(
    [*((name, pa.string()) for name in TEXTS), ("held_out", pa.bool_()), ("hash", pa.binary(16))]
)
SAID_S = 30.0  # between two words about what takes long
NAME_CHARS = 500  # of a class; longer ones are captions, or the bytes of an image
TOLD = 3  # keys named in an error


@dataclass(frozen=True)
class Examples:
    """The images of one side of the split.

    pixels: uint8 [N, H, W, 3], on the disk. ids: int64 [N], places in the classes. hashes: of the
    encoded bytes.
    """

    pixels: np.ndarray
    ids: np.ndarray
    keys: list[str]
    hashes: list[bytes]


@dataclass(frozen=True)
class TrainingData:
    """All that a training learns from and is judged by. skipped: images that could not be decoded,
    or had no label, and why.
    """

    classes: tuple[str, ...]
    train: Examples
    held_out: Examples
    skipped: list[dict[str, str]]
    digest: str  # of keys, labels and bytes


def gather(
    config: TrainingConfig, pixels: PixelSpec, taught: tuple[str, ...], folder: str
) -> TrainingData:
    """Read, split and decode the config's images into `folder`, unless they are there.

    pixels: the model's processor. taught: the classes of a teacher whose scores are learnt, in its
    order.
    Raises JobError for labels that are missing or unknown, or fewer than two classes; StorageError
    when the disk is full.
    """
    source = _Source(config)
    spec = DecodeSpec(pixels, tuple(source.job.formats), source.job.max_pixels, None)
    larger = replace(spec, pixels=enlarged(spec.pixels) if config.crop < 1 else spec.pixels)
    settings = [
        source.identity(),
        repr((spec, larger)),
        config.validation,
        config.unlabelled,
        config.min_score,
    ]
    settings += [config.label_at, config.label_field, config.table_key, source.bases]
    settings += [config.format, config.image_column, config.key_column, config.image_member]
    cache = os.path.join(folder, short_hash(json.dumps(settings), 24))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(f"{cache}.lock", "w") as lock:  # several workers of one machine ask at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.isdir(cache):
                with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as scratch:
                    os.mkdir(whole := f"{scratch}/whole")
                    _decode_into(whole, source, (larger, spec), config.validation)
                    os.rename(whole, cache)
    except OSError as error:
        raise StorageError(
            f"{cache}: {one_line(error)}. Decoded images need room there: free some, then run "
            f"again."
        ) from error
    return _open(config, cache, (larger.pixels.shape, spec.pixels.shape), taught)


def label_rows(
    config: TrainingConfig, column: str
) -> tuple[list[tuple[str, str | None]], pa.ChunkedArray, list[dict[str, str]]]:
    """(key, label) of each row of the config's dataset, a vector column: what a probe learns from;
    and its bad images.
    """
    source = _Source(config)
    table = source.rows([column])
    places = zip(table["shard"].to_pylist(), table["index"].to_pylist())
    rows = zip(table["key"].to_pylist(), source.texts(table), places)
    pairs = [(source.short(key), source.label_of(key, text, place)) for key, text, place in rows]
    source.tell_unused()
    return pairs, table[column], source.bad()


def is_held_out(key: str, share: float) -> bool:
    return (
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < share * 2**64
    )


def enlarged(pixels: PixelSpec) -> PixelSpec:
    """The same processor for sides MARGIN times as long."""
    size = None if pixels.size is None else tuple(ceil(MARGIN * side) for side in pixels.size)
    crop = (
        None
        if pixels.crop is None
        else (ceil(MARGIN * pixels.crop[0]), ceil(MARGIN * pixels.crop[1]))
    )
    return replace(pixels, size=size, crop=crop)


def class_ids(pairs: Sequence[tuple[str, str]], classes: tuple[str, ...]) -> np.ndarray:
    """int64 places in the classes of (key, label) pairs; a number is a place itself where no class
    is called a number. Raises JobError.
    """
    places = {name: n for n, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        places |= {str(n): n for n in range(len(classes))}
    if unknown := [f"{label} of {key}" for key, label in pairs if label not in places]:
        raise JobError(
            f"{len(unknown):,} labels are not among the {len(classes)} classes, such as "
            f"{', '.join(unknown[:TOLD])}. Correct `classes`."
        )
    return np.array([places[label] for _, label in pairs], np.int64)


def choose_classes(
    config: TrainingConfig, seen: set[str], taught: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """As the config names them, as the teacher has them, or those that were seen, numbers by size.
    Raises JobError for one alone.
    """
    if odd := next((name for name in sorted(seen) if len(name) > NAME_CHARS), None):
        raise JobError(
            f"a label of {len(odd):,} characters is no class name: {odd[:40]}… Correct `label` "
            f"({config.label_place})."
        )
    found = tuple(config.classes) or taught
    if not found:
        found = tuple(
            sorted(
                seen,
                key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name),
            )
        )
    if len(seen) < 2 or len(found) < 2:
        raise JobError(
            f"the images have {len(seen)} class ({', '.join(sorted(seen)) or 'no label'}); to "
            f"tell classes apart takes two. "
            "Correct `source` or `label`."
        )
    return found


def require_labels(config: TrainingConfig, pairs: Sequence[tuple[str, str | None]]) -> None:
    """Raises JobError where images have no label and the config does not skip them, and where a
    label_table names none of them.
    """
    lacking = [key for key, label in pairs if label is None]
    if config.label_table and len(lacking) == len(pairs) > 0:
        keys = list(labels_by_key(config) or ())
        raise JobError(
            f"label_table {config.label_table} names none of {count(len(pairs), 'image')}: its "
            f"{config.table_key} holds "
            f"{', '.join(keys[:TOLD]) or 'nothing'}, the images are {', '.join(lacking[:TOLD])}. "
            f"Correct `label_table` or `table_key`."
        )
    if lacking and config.unlabelled == "refuse":
        fields = "`label`, `label_table` or `table_key`" if config.label_table else "`label`"
        raise JobError(
            f"{count(len(lacking), 'image')} without a label ({config.label_place}), such as "
            f"{', '.join(lacking[:TOLD])}. "
            f"Correct {fields}, or set unlabelled: skip."
        )


def require_both(config: TrainingConfig, train: np.ndarray, held_out: np.ndarray) -> None:
    """Raises JobError where the split leaves one side of these class ids without what it needs."""
    if len(set(train.tolist())) < 2:
        raise JobError(
            "the images that are not held out have one class only. Give more images, or a smaller "
            "`validation`."
        )
    if config.validation and not len(held_out):
        raise JobError(
            "no image fell into the held-out share. Set a larger `validation`, or 0 to train "
            "without."
        )


class _Source:
    """The images of a config with their labels, whichever of its fields says where they are."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.dataset = require_complete(config.from_dataset) if config.from_dataset else None
        self.job = prepared(self.dataset.job if self.dataset else config.source_job())
        if self.dataset:
            require_outside(self.dataset, "`out`", absolute(config.out))
        self.bases = [
            re.split(r"[*?\[{]", pattern)[0].rpartition("/")[0] for pattern in self.job.source
        ]
        self.bases += self.job.source
        self.table, self.used = labels_by_key(config), dict[str, tuple[str, int]]()
        if self.dataset is None:
            if self.job.keep and self.shards[0].kind == "files":
                raise JobError(
                    f"label: {config.label_at}: loose files have no columns. Set label: folder, "
                    f"or give a label_table."
                )
            file_passthrough_schema(
                self.shards[0], self.job
            )  # says which columns there are, where the label's is not
            return
        known = [*self.dataset.schema.names, "folder"]
        if self.table is None and config.label_at not in known:
            raise JobError(
                f"{self.dataset.out} has no column `{config.label_at}`. `label` may be one of "
                f"{', '.join(known)}."
            )

    def bad(self) -> list[dict[str, str]]:
        """Images that the dataset could not decode: key, reason, message."""
        rows = (
            read_errors(self.dataset).select(["key", "reason", "message"]).to_pylist()
            if self.dataset
            else []
        )
        return [{**row, "key": self.short(row["key"])} for row in rows]

    @cached_property
    def shards(self) -> list[Shard]:
        """Not listed before they are asked for: stored embeddings are enough for a probe."""
        if self.dataset:
            return list_source(self.job, self.dataset.out).shards
        return list_shards(self.job, ()).shards

    def identity(self) -> list[object]:
        """What changes when the images or their labels do."""
        table = short_hash(repr(sorted(self.table.items()))) if self.table is not None else None
        return [
            [shard.id for shard in self.shards],
            self.dataset and self.dataset.fingerprint,
            table,
        ]

    def rows(self, more: list[str]) -> pa.Table:
        """The dataset's rows that are sure enough."""
        assert self.dataset is not None
        names = ["key", "shard", "index", "content_hash", *more]
        names += [
            name for name in (self.config.label_at, "score") if name in self.dataset.schema.names
        ]
        table = read(self.dataset.out, list(dict.fromkeys(names)))
        if (
            "score" in table.column_names and self.config.min_score
        ):  # scores of a regression may be negative
            table = table.filter(pa.array(table["score"].to_numpy() >= self.config.min_score))
        return table

    def texts(self, table: pa.Table) -> list[object]:
        """What stands in the label's place of each of these rows."""
        name = self.config.label_at
        return table[name].to_pylist() if name in table.column_names else [None] * len(table)

    def images(self) -> Iterator[tuple[str, str | None, Encoded]]:
        """Keys without the folder of the source, so that a move changes nothing; labels; images."""
        for shard, there in self._parts():
            for item in read_shard(
                shard, self.job, (lambda index: True) if there is None else there.__contains__
            ):
                if isinstance(item, Encoded):
                    text = there[item.index] if there is not None else _first_passthrough(item)
                    yield (
                        self.short(item.key),
                        self.label_of(item.key, text, (shard.id, item.index)),
                        item,
                    )
                elif item.truncated_at is not None:
                    log.warning(
                        "%s is cut short at byte %d: its %d images are used",
                        shard.url,
                        item.truncated_at,
                        item.total,
                    )
        self.tell_unused()

    def tell_unused(self) -> None:
        """Of the rows of a label_table that name no image; nothing where none does, which is an
        error later.
        """
        unused = [key for key in self.table or () if key not in self.used] if self.used else []
        if unused:
            where = (
                f"{len(unused):,} of {len(self.table or ()):,} keys of label_table "
                f"{self.config.label_table}"
            )
            log.warning("%s name no image, such as %s", where, ", ".join(unused[:TOLD]))

    def _parts(self) -> Iterator[tuple[Shard, dict[int, object] | None]]:
        """Shards, and of a dataset's the rows that are wanted, with what stands in the label's
        place of each.
        """
        if self.dataset is None:
            yield from ((shard, None) for shard in self.shards)
            return
        table, by_shard = self.rows([]), dict[str, dict[int, object]]()
        for shard_id, index, text in zip(
            table["shard"].to_pylist(), table["index"].to_pylist(), self.texts(table)
        ):
            by_shard.setdefault(shard_id, {})[index] = text
        if lost := by_shard.keys() - {shard.id for shard in self.shards}:
            rows = sum(len(by_shard[shard]) for shard in lost)
            raise JobError(
                f"{rows:,} of {len(table):,} images of {self.dataset.out} are no longer where "
                f"they were labelled: {len(lost)} of its shards "
                "changed or went. Run its job again (vitray run --prune, where they are gone), "
                "then this one."
            )
        yield from ((shard, by_shard.get(shard.id, {})) for shard in self.shards)

    def short(self, key: str) -> str:
        return min(
            (key[len(base) + 1 :] for base in self.bases if key.startswith(f"{base}/")),
            key=len,
            default=key,
        )

    def label_of(self, key: str, text: object, place: tuple[str, int]) -> str | None:
        """The label as text; None where there is none. place: the image's shard and index, since
        keys may repeat.
        """
        if self.table is not None:
            found: object = self._in_table(key, place)
        elif self.config.label_at == "folder":
            found = key.rpartition("/")[0].rpartition("/")[2]
        else:
            found = text
        if self.config.label_field is not None and found is not None:
            found = field_of(found, self.config.label_field)
        return text_of(found, self.config)

    def _in_table(self, key: str, place: tuple[str, int]) -> str | None:
        """By the whole key, what is below the source, or the file's name. Raises JobError where a
        row would label two images.
        """
        assert self.table is not None
        names = (key, self.short(key), key.rpartition("/")[2])
        name = next((name for name in names if name in self.table), None)
        if name is None:
            return None
        if self.used.setdefault(name, place) != place:
            what = (
                f"label_table {self.config.label_table} has one row for {name}, and several images "
                f"are called so, such as {key}"
            )
            raise JobError(
                f"{what}. Write their keys whole; tell images of one key apart by another "
                f"key_column."
            )
        return self.table[name]


def _first_passthrough(item: Encoded) -> object:
    """The label's column, which is the only one that is kept, as Python has it."""
    return (
        python_value(item.passthrough.batch.column(0)[item.passthrough.row])
        if item.passthrough is not None
        else None
    )


def _decode_into(
    folder: str, source: _Source, specs: tuple[DecodeSpec, DecodeSpec], share: float
) -> None:
    """train.u8 and held-out.u8, pixels one after the other; rows.parquet, with a reason where a row
    has no pixels there.
    """
    rows: list[tuple[object, ...]] = []
    workers, images, said = len(os.sched_getaffinity(0)), source.images(), time.monotonic()
    waiting: deque[tuple[int, list[tuple[str, str | None, Encoded]], Future[Any]]] = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        open(f"{folder}/train.u8", "wb") as one,
        open(f"{folder}/held-out.u8", "wb") as two,
    ):

        def settle() -> None:
            side, chunk, future = waiting.popleft()
            pixels, outcomes = future.result()
            (one, two)[side].write(pixels.tobytes())
            for (key, label, image), outcome in zip(chunk, outcomes):
                rows.append(
                    (
                        key,
                        label,
                        outcome.reason,
                        outcome.message,
                        bool(side),
                        content_hash(image.data or b""),
                    )
                )

        while chunk := list(islice(images, CHUNK)):
            rows += [
                (key, None, NO_LABEL, "skipped", False, None)
                for key, label, _ in chunk
                if label is None
            ]
            for side in (0, 1):
                part = [
                    it
                    for it in chunk
                    if it[1] is not None and is_held_out(it[0], share) == bool(side)
                ]
                if part:
                    waiting.append(
                        (
                            side,
                            part,
                            pool.submit(decode, [image for *_, image in part], specs[side]),
                        )
                    )
            while len(waiting) > 2 * workers:
                settle()
            if time.monotonic() - said > SAID_S:
                said = time.monotonic()
                log.warning("%s read and decoded", count(len(rows), "image"))
        while waiting:
            settle()
    rows += [(row["key"], None, row["reason"], row["message"], False, None) for row in source.bad()]
    columns = [pa.array([row[n] for row in rows], field.type) for n, field in enumerate(ROWS)]
    pq.write_table(pa.table(columns, schema=ROWS), f"{folder}/rows.parquet")


def _open(
    config: TrainingConfig,
    cache: str,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    taught: tuple[str, ...],
) -> TrainingData:
    with open(f"{cache}/rows.parquet", "rb") as stream:
        table = read_table(stream, ROWS.names).to_pylist()
    require_labels(
        config, [(row["key"], row["label"]) for row in table if row["reason"] in (None, NO_LABEL)]
    )
    rows = [row for row in table if row["reason"] is None]
    skipped = [
        {name: row[name] for name in ("key", "reason", "message")}
        for row in table
        if row["reason"] is not None
    ]
    if not rows:
        first = "".join(f", {it['key']}: {it['reason']}" for it in skipped[:1])
        why = f"{len(skipped):,} of {len(table):,} images cannot be used{first}"
        raise JobError(f"there is nothing to learn from: {why}. Correct `source` or `label`.")
    classes = choose_classes(config, {row["label"] for row in rows}, taught)
    ids = class_ids([(row["key"], row["label"]) for row in rows], classes)
    sides = []
    for side, name in enumerate(("train.u8", "held-out.u8")):
        here = [n for n, row in enumerate(rows) if row["held_out"] == bool(side)]
        shape = (len(here), *shapes[side], 3)
        pixels = (
            np.memmap(f"{cache}/{name}", np.uint8, "r", shape=shape)
            if here
            else np.zeros(shape, np.uint8)
        )
        sides.append(
            Examples(
                pixels, ids[here], [rows[n]["key"] for n in here], [rows[n]["hash"] for n in here]
            )
        )
    require_both(config, sides[0].ids, sides[1].ids)
    digest = short_hash(repr([(row["key"], row["label"], row["hash"].hex()) for row in rows]), 32)
    return TrainingData(classes, sides[0], sides[1], skipped, digest)


def work_folder(out: str) -> str:
    """Where decoded images lie on this machine while `out` is trained."""
    if is_local(out):
        return join(absolute(out), "_vitray", "images")
    from vitray.models.checkpoint import cache_directory

    return os.path.join(cache_directory("finetune"), short_hash(absolute(out), 24))


def forget(out: str) -> None:
    """Delete them, and folders that they leave empty."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    for folder in (join(absolute(out), "_vitray"), absolute(out)):
        store_for(out).delete_folder(folder)
