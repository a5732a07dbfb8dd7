"""The stages read, decode, predict and write, as functions without threads, processes or Ray.

A shard is read as fragments: ranges of fixed length. Fragments are decoded and predicted in blocks,
so that several small shards fill one batch of the model. Each fragment is written by itself.

With `decode: gpu` or `decode: hybrid` the decode stage leaves baseline JPEGs encoded, and the
predict stage decodes them on the device of the model.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vitray.arrow_types import take_rows, with_type
from vitray.crash import crash_point
from vitray.dataset import (
    Commit,
    Dataset,
    commit_shard,
    commit_whole,
    read_fragment,
    repair_staging,
    write_end,
    write_fragment,
)
from vitray.decoding.decode import (
    ON_DEVICE,
    Outcome,
    decode,
    decode_bytes,
    fit_size,
    left_to_device,
)
from vitray.errors import (
    JobError,
    ObjectChanged,
    ShardError,
    StorageError,
    VitrayError,
    one_line,
)
from vitray.left_out import LeftOut
from vitray.models import Model, Predictions
from vitray.pipeline.events import (
    FragmentEvent,
    FragmentSkipped,
    FragmentWritten,
    ShardBroken,
    ShardChanged,
    ShardCommitted,
    ShardEnded,
    ShardFailed,
    ShardOutcome,
)
from vitray.schema import (
    ERROR_SCHEMA,
    IMAGE_FIELDS,
    Encoded,
    End,
    Shard,
    content_hash,
    passthrough_table,
)
from vitray.sources import read_shard, require_passthrough

if TYPE_CHECKING:
    from vitray.models.gpu_decode import DeviceDecoder

READS = 3  # of a shard with invalid bytes: a proxy may have damaged them
READ_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class FragmentInfo:
    """Which images a fragment has, and what the stages measured.

    end: of the shard, where this is the last fragment. is_staged: whether staging of the shard
    existed when it was read. seconds: by stage. size_bytes: of the encoded images.
    """

    shard: Shard
    start: int
    stop: int
    end: End | None = None
    is_staged: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.stop - self.start

    @property
    def is_whole_shard(self) -> bool:
        return self.end is not None and (self.start, self.stop) == (0, self.end.total)

    def timed(self, stage: str, seconds: float) -> FragmentInfo:
        return replace(self, seconds={**self.seconds, stage: seconds})


@dataclass(frozen=True, slots=True)
class EncodedFragment:
    """A fragment before the decode stage.

    hashes: the content hash of each image, None where it has no bytes. They are made here, while
    other threads wait for a decoder. passthrough: its columns, a row for each image.
    """

    info: FragmentInfo
    images: list[Encoded]
    hashes: list[bytes | None]
    passthrough: pa.Table


@dataclass(frozen=True, slots=True)
class FragmentRows:
    """A fragment after the decode stage: its good rows and its error rows."""

    info: FragmentInfo
    rows: pa.Table
    errors: pa.Table


@dataclass(frozen=True, slots=True)
class DecodedBlock:
    """Decoded fragments, and the pixels of all their good rows in order.

    pixels: uint8 [N, H, W, 3]; with a decode mode in ON_DEVICE, a list of arrays and of `Coded`.
    """

    fragments: list[FragmentRows]
    pixels: Any

    @property
    def size_bytes(self) -> int:
        """Of the pixels, and of images that are still encoded."""
        if isinstance(self.pixels, list):
            return sum(getattr(image, "nbytes", 0) or len(image.data) for image in self.pixels)
        return int(self.pixels.nbytes)


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """The end of a shard whose last fragment had been staged before."""

    shard: Shard
    end: End


ReadItem = EncodedFragment | FragmentSkipped | ShardEnd | ShardEnded | ShardOutcome


def read_stage(dataset: Dataset, shard: Shard) -> Iterator[ReadItem]:
    """The shard's images, a fragment for each range of fragment_rows.

    The end comes with the last fragment. A range that is staged already becomes an event: it is not
    decoded or predicted again. Nothing is raised for a shard that cannot be read: the last item is
    ShardFailed, ShardChanged, or, after READS attempts, ShardBroken.
    """
    started = time.perf_counter()
    try:
        require_passthrough(shard, dataset.job, dataset.passthrough)
        staged = repair_staging(dataset, shard.id)
        if staged.covers():
            for span in staged.ranges():
                yield _skipped(dataset, shard.id, span)
            yield ShardEnded(shard.id, staged.ends[0])
            return
        # A short fragment is left out: it may be the tail of a read that ended elsewhere, and would
        # shift the fragments of this read.
        full = {
            start: stop
            for start, stop in staged.fragments.items()
            if stop - start == dataset.fragment_rows
        }
        is_staged = bool(staged.fragments or staged.ends)
        reader = _FragmentReader(dataset, shard, full, is_staged, started)
        for attempt in range(1, READS + 1):
            try:
                yield from reader.fragments()
                return
            except ShardError:
                if attempt == READS:
                    raise
                time.sleep(READ_AGAIN_S)
    except (JobError, ShardError, StorageError) as error:
        yield _outcome_of(shard.id, error)


def _outcome_of(shard_id: str, error: VitrayError) -> ShardOutcome:
    if isinstance(error, ObjectChanged):
        return ShardChanged(shard_id)
    # A JobError means that this shard lacks a passthrough column.
    if isinstance(error, (JobError, ShardError)):
        return ShardBroken(shard_id, str(error))
    return ShardFailed(shard_id, str(error))


@dataclass
class _FragmentReader:
    """Divides the images of one shard into fragments.

    staged: {start: stop} of the staged fragments. started: when the images of the next fragment
    began to be read. sent: the starts of what an earlier attempt yielded.
    """

    dataset: Dataset
    shard: Shard
    staged: dict[int, int]
    is_staged: bool
    started: float
    sent: set[int] = field(default_factory=set)

    def fragments(self) -> Iterator[EncodedFragment | FragmentSkipped | ShardEnd]:
        """What was not sent yet; the last one has the end. Raises what read_shard raises."""
        last: EncodedFragment | None = None  # held back until it is known whether the end follows
        try:
            for item in self._ranges():
                if isinstance(item, End):
                    yield self._ended(last, item)
                    return
                if last is not None:
                    yield self._sent(last)
                    last = None
                if isinstance(item, EncodedFragment):
                    last = item
                else:
                    self.sent.add(item.start)
                    yield item
        except VitrayError:
            if last is not None:
                yield self._sent(last)
            raise
        raise ShardError(f"{self.shard.url}: the source ended without the number of its images")

    def _ended(self, last: EncodedFragment | None, end: End) -> EncodedFragment | ShardEnd:
        if last is None:
            return ShardEnd(self.shard, end)
        return self._sent(replace(last, info=replace(last.info, end=end)))

    def _sent(self, fragment: EncodedFragment) -> EncodedFragment:
        self.sent.add(fragment.info.start)
        return fragment

    def _ranges(self) -> Iterator[EncodedFragment | FragmentSkipped | End]:
        rows = self.dataset.fragment_rows
        images = list[Encoded]()
        start = 0
        for item in read_shard(self.shard, self.dataset.job, self._is_wanted):
            position = item.total if isinstance(item, End) else item.index
            boundary = position // rows * rows
            while start + rows <= boundary:  # the range is complete, or was skipped completely
                yield from self._range((start, start + rows), images)
                images = []
                start += rows
            if isinstance(item, End):
                if start < item.total:
                    yield from self._range((start, item.total), images)
                yield item
                return
            images.append(item)
            if item.index == start + rows - 1:
                yield from self._range((start, start + rows), images)
                images = []
                start += rows
                self.started = time.perf_counter()

    def _is_wanted(self, index: int) -> bool:
        rows = self.dataset.fragment_rows
        return self.staged.get(index // rows * rows, 0) <= index

    def _range(
        self, span: tuple[int, int], images: list[Encoded]
    ) -> Iterator[EncodedFragment | FragmentSkipped]:
        start, stop = span
        if start in self.sent:
            return
        if self.staged.get(start) == stop:
            yield _skipped(self.dataset, self.shard.id, span)
            return
        seconds = time.perf_counter() - self.started
        self.started = time.perf_counter()
        trace("read", self.shard.id, start, stop)
        further = sum(image.further_images for image in images)
        info = FragmentInfo(
            self.shard,
            start,
            stop,
            is_staged=self.is_staged,
            seconds={"read": seconds},
            size_bytes=sum(len(image.data or b"") for image in images),
            left_out={LeftOut.FURTHER_IMAGE: further} if further else {},
        )
        yield encoded_fragment(info, images, self.dataset.passthrough)


def _skipped(dataset: Dataset, shard_id: str, span: tuple[int, int]) -> FragmentSkipped:
    fragment = read_fragment(dataset, shard_id, *span)
    if fragment is None:
        raise StorageError(
            f"{shard_id}: fragment {span[0]}-{span[1]} is damaged. Run again: it is computed again."
        )
    return FragmentSkipped(shard_id, *span, reasons=_reason_counts(fragment.errors))


def encoded_fragment(
    info: FragmentInfo, images: list[Encoded], passthrough: pa.Schema
) -> EncodedFragment:
    """The images, with passthrough columns of the dataset's types.

    Raises ShardError for a value that does not fit its type.
    """
    hashes = [None if image.data is None else content_hash(image.data) for image in images]
    if not len(passthrough):
        return EncodedFragment(info, images, hashes, pa.table({}))
    rows = [image.passthrough for image in images if image.passthrough is not None]
    table = passthrough_table(rows, passthrough)
    columns = {}
    for n, column in enumerate(passthrough):
        try:
            columns[column.name] = with_type(table.column(n), column.type)
        except (pa.ArrowException, OverflowError) as error:
            raise ShardError(
                f"a value of column `{column.name}` does not fit the dataset's {column.type}: "
                f"{one_line(error)}"
            ) from error
    return EncodedFragment(info, images, hashes, pa.table(columns))


@dataclass(frozen=True, slots=True)
class _DecodedImage:
    """An image after the decode stage. turn: EXIF orientation of a JPEG left encoded, or 0."""

    image: Encoded
    outcome: Outcome
    content_hash: bytes | None
    turn: int


def decode_stage(dataset: Dataset, fragments: Sequence[EncodedFragment]) -> DecodedBlock:
    """Encoded images -> good rows, error rows, and the pixels of the good rows."""
    started = time.perf_counter()
    decoded, pixels = _decode_images(
        dataset,
        [image for fragment in fragments for image in fragment.images],
        [digest for fragment in fragments for digest in fragment.hashes],
    )
    seconds = (time.perf_counter() - started) / max(1, len(decoded))
    results = list[FragmentRows]()
    first = 0
    for fragment in fragments:
        stop = first + len(fragment.images)
        results.append(_decoded_rows(dataset, fragment, decoded[first:stop], seconds))
        first = stop
    if dataset.job.decode in ON_DEVICE:
        pixels = _images_for_device(decoded, pixels)
    return DecodedBlock(results, pixels)


def _decode_images(
    dataset: Dataset, images: list[Encoded], hashes: list[bytes | None]
) -> tuple[list[_DecodedImage], Any]:
    """(all images, the pixels of the good ones that the CPU decoded)."""
    spec = dataset.decode_spec
    device_jpegs = [left_to_device(image.data, spec) for image in images]
    on_cpu = [image for image, jpeg in zip(images, device_jpegs) if jpeg is None]
    pixels, outcomes = decode(on_cpu, spec)
    next_outcome = iter(outcomes)
    decoded = list[_DecodedImage]()
    for image, digest, jpeg in zip(images, hashes, device_jpegs):
        outcome, turn = (next(next_outcome), 0) if jpeg is None else jpeg
        decoded.append(_DecodedImage(image, outcome, digest, turn))
    return decoded, pixels


def _decoded_rows(
    dataset: Dataset, fragment: EncodedFragment, images: list[_DecodedImage], seconds: float
) -> FragmentRows:
    """One fragment of a block. seconds: that decoding one image took."""
    info = fragment.info
    shard_id = info.shard.id
    good = [n for n, image in enumerate(images) if image.outcome.reason is None]
    good_images = [images[n] for n in good]
    columns = _image_columns(shard_id, good_images)
    for column in dataset.passthrough:
        columns[column.name] = take_rows(fragment.passthrough[column.name], good)
    bad_images = [image for image in images if image.outcome.reason is not None]
    errors = pa.Table.from_pylist(
        [_error_row(shard_id, image) for image in bad_images], schema=ERROR_SCHEMA
    )
    trace("decode", shard_id, info.start, info.stop)
    further_pages = sum(image.outcome.further_pages for image in good_images)
    if further_pages:
        info = replace(info, left_out={**info.left_out, LeftOut.FURTHER_PAGE: further_pages})
    return FragmentRows(info.timed("decode", seconds * len(images)), pa.table(columns), errors)


def _image_columns(shard_id: str, images: list[_DecodedImage]) -> dict[str, Any]:
    """The columns of IMAGE_FIELDS."""
    values: dict[str, list[Any]] = {
        "shard": [shard_id] * len(images),
        "content_hash": [image.content_hash for image in images],
    }
    for name in ("key", "index", "uri"):
        values[name] = [getattr(image.image, name) for image in images]
    for name in ("width", "height", "format"):
        values[name] = [getattr(image.outcome, name) for image in images]
    return {column.name: pa.array(values[column.name], column.type) for column in IMAGE_FIELDS}


def _images_for_device(images: list[_DecodedImage], pixels: Any) -> list[Any]:
    """The good images: pixels that the CPU decoded, and JPEGs for the device."""
    from vitray.models.gpu_decode import Coded

    decoded = iter(pixels)
    return [
        Coded(image.image.data, image.turn, image.outcome.width, image.outcome.height)
        if image.turn
        else next(decoded)
        for image in images
        if image.outcome.reason is None
    ]


def _error_row(shard_id: str, image: _DecodedImage) -> dict[str, object]:
    return {
        "key": image.image.key,
        "shard": shard_id,
        "index": image.image.index,
        "uri": image.image.uri,
        "reason": image.outcome.reason,
        "message": image.outcome.message,
        "content_hash": image.content_hash,
        "size_bytes": len(image.image.data or b""),
    }


def open_device_decoder(dataset: Dataset, threads: int) -> DeviceDecoder | None:
    """The decoder for `predict_stage`; None where the decode stage decodes all images.

    Raises ModelError without a GPU.
    """
    spec = dataset.decode_spec
    if spec.mode not in ON_DEVICE:
        return None
    from vitray.models.gpu_decode import open_decoder

    fit = partial(fit_size, pixels=spec.pixels)
    return open_decoder(
        spec.pixels, partial(decode_bytes, spec=spec), fit, threads, shares=spec.mode == "hybrid"
    )


def predict_stage(
    dataset: Dataset, model: Model, block: DecodedBlock, decoder: DeviceDecoder | None = None
) -> list[FragmentRows]:
    """Pixels -> labels and vectors: the fragments, with rows in the dataset's schema."""
    started = time.perf_counter()
    fragments = block.fragments
    pixels = block.pixels
    if decoder is not None:
        fragments, pixels = _decode_on_device(decoder, fragments, pixels)
    rows = sum(fragment.rows.num_rows for fragment in fragments)
    columns = _predicted_columns(dataset, model.predict(pixels)) if rows else {}
    seconds = (time.perf_counter() - started) / max(1, rows)
    results = list[FragmentRows]()
    first = 0
    for fragment in fragments:
        count = fragment.rows.num_rows
        own = {name: column.slice(first, count) for name, column in columns.items()}
        results.append(_predicted_rows(dataset, fragment, own, seconds * count))
        first += count
    return results


def _predicted_rows(
    dataset: Dataset, fragment: FragmentRows, columns: dict[str, pa.Array], seconds: float
) -> FragmentRows:
    info = fragment.info
    if fragment.rows.num_rows:
        table = {name: fragment.rows[name] for name in fragment.rows.column_names} | columns
        rows = pa.table(table).select(dataset.schema.names).cast(dataset.schema)
    else:
        # empty_table() lacks lists of extension types (pyarrow 26.0).
        rows = pa.Table.from_batches([], dataset.schema)
    trace("predict", info.shard.id, info.start, info.stop)
    return FragmentRows(info.timed("predict", seconds), rows, fragment.errors)


def _decode_on_device(
    decoder: DeviceDecoder, fragments: list[FragmentRows], images: list[Any]
) -> tuple[list[FragmentRows], Any]:
    """(the fragments without images that the device refuses, pixels of the others there)."""
    from vitray.models.gpu_decode import Coded

    if not images:
        return fragments, None
    pixels, bad = decoder.decode(images)
    if not bad:
        return fragments, pixels
    results = list[FragmentRows]()
    first = 0
    for fragment in fragments:
        count = fragment.rows.num_rows
        own = [n for n in range(count) if first + n in bad]
        columns = ["key", "shard", "index", "uri", "content_hash"]
        refused = fragment.rows.take(pa.array(own, pa.int64())).select(columns).to_pylist()
        for row, n in zip(refused, own):
            image = images[first + n]
            size = len(image.data) if isinstance(image, Coded) else 0
            refusal = bad[first + n]
            row |= {"reason": refusal.reason, "message": refusal.message, "size_bytes": size}
        refused_table = pa.Table.from_pylist(refused, schema=ERROR_SCHEMA)
        good = pa.array([n for n in range(count) if first + n not in bad], pa.int64())
        all_errors = pa.concat_tables([fragment.errors, refused_table]).sort_by("index")
        rows = fragment.rows.take(good).combine_chunks()
        results.append(FragmentRows(fragment.info, rows, all_errors))
        first += count
    return results, pixels


def _predicted_columns(dataset: Dataset, predictions: Predictions) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if predictions.ids is not None and predictions.scores is not None:
        columns = dict(dataset.label_columns(predictions.ids, predictions.scores))
    for vector in dataset.vectors:
        values = pa.array(predictions.vectors[vector.column].ravel())
        kind = dataset.schema.field(vector.column).type
        columns[vector.column] = pa.FixedSizeListArray.from_arrays(values, type=kind)
    return columns


def write_stage(
    dataset: Dataset, fragment: FragmentRows
) -> list[FragmentEvent | ShardEnded | ShardOutcome]:
    """Store a fragment: as the data file of a shard that it completes alone, else staged.

    Raises StorageError, and CommitError for a data file of another job.
    """
    started = time.perf_counter()
    info = fragment.info
    shard_id = info.shard.id
    outcome = _commit_alone(dataset, fragment) if info.is_whole_shard else None
    if outcome is None:
        span = (info.start, info.stop)
        write_fragment(dataset, shard_id, span, fragment.rows, fragment.errors, info.left_out)
    trace("stage", shard_id, info.start, info.stop)
    written = FragmentWritten(
        shard_id,
        info.start,
        info.stop,
        reasons=_reason_counts(fragment.errors),
        seconds={**info.seconds, "stage": time.perf_counter() - started},
        size_bytes=info.size_bytes,
        left_out=info.left_out,
    )
    if info.end is None:
        return [written]
    if outcome is not None:
        return [written, ShardEnded(shard_id, info.end), outcome]
    return [written, write_shard_end(dataset, ShardEnd(info.shard, info.end))]


def write_shard_end(dataset: Dataset, end: ShardEnd) -> ShardEnded:
    """Stage the end of a shard."""
    write_end(dataset, end.shard.id, end.end)
    crash_point("stage-end", end.shard.id)
    return ShardEnded(end.shard.id, end.end)


def _commit_alone(dataset: Dataset, fragment: FragmentRows) -> ShardOutcome:
    """Commit a shard that is in memory as a whole."""
    info = fragment.info
    started = time.perf_counter()
    assert info.end is not None
    try:
        commit = commit_whole(
            dataset,
            info.shard,
            fragment.rows,
            fragment.errors,
            info.end,
            left_out=info.left_out,
            staged=info.is_staged,
        )
    except ObjectChanged:
        return ShardChanged(info.shard.id)
    return _committed(commit, started)


def commit_stage(dataset: Dataset, shard: Shard) -> ShardOutcome:
    """Commit a shard whose fragments are staged.

    Raises StorageError, and CommitError for a data file of another job.
    """
    started = time.perf_counter()
    try:
        commit = commit_shard(dataset, shard)
    except ObjectChanged:
        return ShardChanged(shard.id)
    if commit is None:
        return ShardFailed(shard.id, "a fragment went missing")
    return _committed(commit, started)


def _committed(commit: Commit, started: float) -> ShardCommitted:
    timed = replace(commit, seconds=time.perf_counter() - started)
    return ShardCommitted(commit.shard, timed)


def _reason_counts(errors: pa.Table) -> dict[str, int]:
    return dict(Counter(errors["reason"].to_pylist()))


def trace(stage: str, shard: str, start: int, stop: int) -> None:
    """The crash point of a stage, and a JSON line for each fragment that leaves the stage.

    The lines are written to the directory VITRAY_TRACE, if it is set.
    """
    crash_point(stage, shard)
    folder = os.environ.get("VITRAY_TRACE")
    if folder:
        record = {
            "step": stage,
            "shard": shard,
            "start": start,
            "stop": stop,
            "pid": os.getpid(),
            "at": time.time(),
        }
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
