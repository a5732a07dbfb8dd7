"""Labelled images of a TrainingConfig, decoded once into a folder of this machine.

Training images are stored larger than the model's input if they are cropped at random. Held-out
images are stored as the model's processor makes them. The split follows from the keys alone, so an
image stays on its side when images are added.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from math import ceil
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.cpus import cores
from vitray.dataset import read_table, training_url
from vitray.decoding.decode import Outcome, decode
from vitray.errors import JobError, StorageError, count, one_line
from vitray.schema import DecodeSpec, PixelSpec, Shard, content_hash, short_hash
from vitray.storage import absolute, is_local, store_for
from vitray.training.activity import Activity, Phase, Watch, unwatched
from vitray.training.config import TrainingConfig
from vitray.training.labelled_source import LabelledImage, LabelledSource
from vitray.training.labels import choose_classes, class_ids, require_both_sides, require_labels

MARGIN = 1.15  # side of a stored image for random crops, as a multiple of the model's input
CHUNK = 64  # images decoded by one call
NO_LABEL = "no_label"
ROWS = pa.schema(
    {
        "key": pa.string(),
        "label": pa.string(),
        "reason": pa.string(),
        "message": pa.string(),
        "held_out": pa.bool_(),
        "hash": pa.binary(16),
    }
)


class Side(StrEnum):
    """A side of the split. Its value names its file of pixels."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Examples:
    """The images of one side of the split.

    pixels: uint8 [N, H, W, 3], a memory map. ids: int64 [N], the classes. hashes: of the encoded
    images.
    """

    pixels: np.ndarray
    ids: np.ndarray
    keys: list[str]
    hashes: list[bytes]


@dataclass(frozen=True)
class TrainingData:
    """The images of both sides. skipped: key, reason and message of images that cannot be used."""

    classes: tuple[str, ...]
    train: Examples
    held_out: Examples
    skipped: list[dict[str, str]]
    digest: str  # of keys, labels and images


def gather(
    config: TrainingConfig,
    pixels: PixelSpec,
    teacher_classes: tuple[str, ...],
    folder: str,
    watch: Watch = unwatched,
) -> TrainingData:
    """The config's images, decoded into `folder` unless an earlier call did that.

    pixels: of the model's processor. teacher_classes: those whose scores are learnt, in the
    teacher's order. watch: of the reading and decoding. Raises JobError for missing or unknown
    labels and for fewer than two classes, StorageError if the disk is full.
    """
    watch(Activity(Phase.READING_SOURCE))
    source = LabelledSource(config)
    spec = DecodeSpec(pixels, tuple(source.job.formats), source.job.max_pixels, None)
    larger = replace(spec, pixels=enlarged(spec.pixels)) if config.crop < 1 else spec
    specs = {Side.TRAIN: larger, Side.HELD_OUT: spec}
    cache = os.path.join(folder, _cache_key(config, source, specs))
    try:
        os.makedirs(folder, exist_ok=True)
        with _locked(f"{cache}.lock"):  # workers of one machine share the cache
            if not os.path.isdir(cache):
                with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder) as scratch:
                    complete = os.path.join(scratch, "complete")
                    os.mkdir(complete)
                    _decode_into(complete, source, specs, watch)
                    os.rename(complete, cache)
    except OSError as error:
        raise StorageError(
            f"{cache}: {one_line(error)}. "
            "The decoded images need more space: free some, then run again."
        ) from error
    return _read_cache(config, cache, specs, teacher_classes)


def _cache_key(
    config: TrainingConfig, source: LabelledSource, specs: Mapping[Side, DecodeSpec]
) -> str:
    """A hash of all that decides which images and labels are in the cache, and their pixels."""
    fields = (
        "format",
        "image_column",
        "image_member",
        "key_column",
        "label_column",
        "label_field",
        "min_score",
        "table_key",
        "unlabelled",
        "validation",
    )
    settings = {
        "source": source.identity(),
        "bases": source.bases,
        "decode": {side: repr(spec) for side, spec in specs.items()},
        "fields": {name: getattr(config, name) for name in fields},
    }
    return short_hash(json.dumps(settings, sort_keys=True), 24)


@contextmanager
def _locked(path: str) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_held_out(key: str, share: float) -> bool:
    """Whether the key's hash is in the first `share` of all hashes."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _side_of(key: str, share: float) -> Side:
    return Side.HELD_OUT if is_held_out(key, share) else Side.TRAIN


def enlarged(pixels: PixelSpec) -> PixelSpec:
    """The same processor with all sides MARGIN times as long."""
    size, crop = pixels.size, pixels.crop
    if size is not None:
        size = tuple(ceil(MARGIN * side) for side in size)
    if crop is not None:
        crop = (ceil(MARGIN * crop[0]), ceil(MARGIN * crop[1]))
    return replace(pixels, size=size, crop=crop)


@dataclass
class _Amount:
    """How much of the source was read: images, or bytes where a shard's images are not known."""

    total: int
    is_bytes: bool
    done: int = 0

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> _Amount:
        rows = [shard.rows for shard in shards]
        if None in rows:
            return cls(sum(shard.size for shard in shards), is_bytes=True)
        return cls(sum(row for row in rows if row), is_bytes=False)

    def add(self, images: list[LabelledImage]) -> None:
        if self.is_bytes:
            self.done += sum(len(each.image.data or b"") for each in images)
        else:
            self.done += len(images)


@dataclass(frozen=True)
class _Submitted:
    """Images of one side that a thread decodes."""

    side: Side
    images: list[LabelledImage]
    decoded: Future[tuple[Any, list[Outcome]]]


@dataclass(frozen=True)
class _Writer:
    """Appends decoded pixels to the file of their side, and a row for each image."""

    files: Mapping[Side, IO[bytes]]
    rows: list[dict[str, object]] = field(default_factory=list)

    def write(self, submitted: _Submitted) -> None:
        """Wait until the images are decoded, then write them."""
        pixels, outcomes = submitted.decoded.result()
        self.files[submitted.side].write(pixels.tobytes())
        for example, outcome in zip(submitted.images, outcomes):
            self.rows.append(
                {
                    "key": example.key,
                    "label": example.label,
                    "reason": outcome.reason,
                    "message": outcome.message,
                    "held_out": submitted.side is Side.HELD_OUT,
                    "hash": content_hash(example.image.data or b""),
                }
            )

    def skip(self, key: str, reason: str, message: str) -> None:
        """A row for an image that is not decoded."""
        self.rows.append({"key": key, "reason": reason, "message": message, "held_out": False})


def _decode_into(
    folder: str, source: LabelledSource, specs: Mapping[Side, DecodeSpec], watch: Watch
) -> None:
    """Write train.u8 and held-out.u8, the pixels of each image after those of the one before it.

    rows.parquet has a row for each image; a row with a reason has no pixels.
    """
    images = source.images()
    amount = _Amount.of(source.shards)
    threads = cores()
    submitted: deque[_Submitted] = deque()
    watch(Activity(Phase.DECODING, 0, amount.total))
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        writer = _Writer(
            {side: stack.enter_context(open(f"{folder}/{side}.u8", "wb")) for side in Side}
        )
        while chunk := list(islice(images, CHUNK)):
            for example in chunk:
                if example.label is None:
                    writer.skip(example.key, NO_LABEL, "skipped")
            for side, part in _by_side(chunk, source.config.validation).items():
                encoded = [example.image for example in part]
                submitted.append(_Submitted(side, part, pool.submit(decode, encoded, specs[side])))
            while len(submitted) > 2 * threads:
                writer.write(submitted.popleft())
            amount.add(chunk)
            watch(Activity(Phase.DECODING, amount.done, amount.total, len(writer.rows)))
        while submitted:
            writer.write(submitted.popleft())
    for row in source.undecodable():
        writer.skip(row["key"], row["reason"], row["message"])
    pq.write_table(pa.Table.from_pylist(writer.rows, schema=ROWS), f"{folder}/rows.parquet")


def _by_side(images: list[LabelledImage], share: float) -> dict[Side, list[LabelledImage]]:
    """The images that have a label, by side; a side without images is left out."""
    sides: dict[Side, list[LabelledImage]] = {side: [] for side in Side}
    for example in images:
        if example.label is not None:
            sides[_side_of(example.key, share)].append(example)
    return {side: part for side, part in sides.items() if part}


def _read_cache(
    config: TrainingConfig,
    cache: str,
    specs: Mapping[Side, DecodeSpec],
    teacher_classes: tuple[str, ...],
) -> TrainingData:
    with open(f"{cache}/rows.parquet", "rb") as stream:
        all_rows = read_table(stream, ROWS.names).to_pylist()
    decodable = [row for row in all_rows if row["reason"] in (None, NO_LABEL)]
    require_labels(config, [(row["key"], row["label"]) for row in decodable])
    rows = [row for row in all_rows if row["reason"] is None]
    skipped = [
        {name: row[name] for name in ("key", "reason", "message")}
        for row in all_rows
        if row["reason"] is not None
    ]
    if not rows:
        first = f", {skipped[0]['key']}: {skipped[0]['reason']}" if skipped else ""
        raise JobError(
            f"there is nothing to learn from: {len(skipped):,} of {count(len(all_rows), 'image')} "
            f"cannot be used{first}. Correct `source` or `label`."
        )
    classes = choose_classes(config, {row["label"] for row in rows}, teacher_classes)
    ids = class_ids([(row["key"], row["label"]) for row in rows], classes)
    is_held = np.array([row["held_out"] for row in rows], bool)
    train = _examples(cache, Side.TRAIN, specs, rows, ids[~is_held])
    held_out = _examples(cache, Side.HELD_OUT, specs, rows, ids[is_held])
    require_both_sides(config, train.ids, held_out.ids)
    digest = short_hash(repr([(row["key"], row["label"], row["hash"].hex()) for row in rows]), 32)
    return TrainingData(classes, train, held_out, skipped, digest)


def _examples(
    cache: str,
    side: Side,
    specs: Mapping[Side, DecodeSpec],
    rows: list[dict[str, Any]],
    ids: np.ndarray,
) -> Examples:
    """The examples of a side. rows: of both sides; ids: of this one."""
    own = [row for row in rows if row["held_out"] == (side is Side.HELD_OUT)]
    shape = (len(own), *specs[side].pixels.shape, 3)
    pixels = np.zeros(shape, np.uint8)
    if own:
        pixels = np.memmap(f"{cache}/{side}.u8", np.uint8, "r", shape=shape)
    return Examples(pixels, ids, [row["key"] for row in own], [row["hash"] for row in own])


def work_folder(out: str) -> str:
    """The folder of this machine for the decoded images of a training into `out`."""
    if is_local(out):
        return training_url(out, "images")
    from vitray.storage import cache_directory

    return os.path.join(cache_directory("finetune"), short_hash(absolute(out), 24))


def delete_work_folder(out: str) -> None:
    """Delete the decoded images, and folders that are empty then."""
    shutil.rmtree(work_folder(out), ignore_errors=True)
    for folder in (training_url(out), absolute(out)):
        store_for(out).delete_folder(folder)
