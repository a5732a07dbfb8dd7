"""The stages read, decode, predict and write, as functions of one fragment, without Ray.

A `FragmentBatch` is one fragment in flight. It is one row of a Ray block, so no block boundary can
split a fragment.

With `decode: gpu` or `decode: hybrid` the decode stage leaves baseline JPEGs encoded, and the
predict stage decodes them on the device of the model.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vitray.arrow_types import take_rows, with_type
from vitray.crash import crash_point
from vitray.dataset import (
    Commit,
    Dataset,
    commit_shard,
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
from vitray.errors import JobError, ObjectChanged, ShardError, StorageError, VitrayError, one_line
from vitray.left_out import LeftOut
from vitray.models import Model, Predictions
from vitray.schema import (
    ERROR_SCHEMA,
    IMAGE_FIELDS,
    Encoded,
    End,
    EventKind,
    Shard,
    ShardEvent,
    content_hash,
    ipc_bytes,
    ipc_table,
    passthrough_table,
)
from vitray.sources import read_shard, require_passthrough

if TYPE_CHECKING:
    from vitray.models.gpu_decode import DeviceDecoder

READS = 3  # of a shard with invalid bytes: a proxy may have damaged them
READ_AGAIN_S = 0.5
# The dictionaries of a ShardEvent. They travel as JSON.
COUNTS = ("reasons", "seconds", "left_out", "image_members")
FRAGMENT_BATCH_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "shard", "message", *COUNTS)]
    + [(name, pa.int64()) for name in ("start", "stop", "total", "truncated_at", "size_bytes")]
    + [(name, pa.large_binary()) for name in ("rows", "errors")]
)
# The first fields of Encoded, in order: its columns in a FragmentBatch before the decode stage.
ENCODED_TYPES = {
    "index": pa.int32(),
    "key": pa.string(),
    "uri": pa.string(),
    "data": pa.large_binary(),
    "reason": pa.string(),
    "message": pa.string(),
}
PIXEL_COLUMNS = ("pixels", "turn")  # between the decode stage and the predict stage


@dataclass(frozen=True, slots=True)
class FragmentBatch:
    """An event and the rows that it is about. After the write stage, rows and errors are None."""

    event: ShardEvent
    truncated_at: int | None = None
    rows: pa.Table | None = None
    errors: pa.Table | None = None

    def pack(self) -> pa.Table:
        """One row of a Ray block."""
        event = self.event
        counts = {name: json.dumps(getattr(event, name)) for name in COUNTS}
        row = {
            "kind": event.kind.value,
            "shard": event.shard,
            "message": event.message,
            **counts,
            "start": event.start,
            "stop": event.stop,
            "total": event.total,
            "truncated_at": self.truncated_at,
            "size_bytes": event.size_bytes,
            "rows": None if self.rows is None else ipc_bytes(self.rows),
            "errors": None if self.errors is None else ipc_bytes(self.errors),
        }
        columns = [pa.array([row[column.name]], column.type) for column in FRAGMENT_BATCH_SCHEMA]
        return pa.Table.from_arrays(columns, schema=FRAGMENT_BATCH_SCHEMA)


def unpack(block: pa.Table) -> Iterator[FragmentBatch]:
    """The batches in a block; their tables are views on the block's memory."""
    for n in range(block.num_rows):
        row = {name: block[name][n] for name in FRAGMENT_BATCH_SCHEMA.names}
        rows = row.pop("rows")
        errors = row.pop("errors")
        values = {name: scalar.as_py() for name, scalar in row.items()}
        truncated_at = values.pop("truncated_at")
        values |= {name: json.loads(values[name]) for name in COUNTS}
        values["kind"] = EventKind(values["kind"])
        yield FragmentBatch(ShardEvent(**values), truncated_at, _table_in(rows), _table_in(errors))


def _table_in(scalar: pa.Scalar) -> pa.Table | None:
    return ipc_table(scalar.as_buffer()) if scalar.is_valid else None


def read_stage(dataset: Dataset, shard: Shard) -> Iterator[FragmentBatch]:
    """The shard's encoded images, one batch for each range of fragment_rows, then its end.

    A range that is already staged becomes an event: it is not decoded or predicted again. Nothing
    is raised for a shard that cannot be read: its last event is SHARD_FAILED, SHARD_CHANGED, or,
    after READS attempts, SHARD_BROKEN.
    """
    started = time.perf_counter()
    try:
        require_passthrough(shard, dataset.job, dataset.passthrough)
        staged = repair_staging(dataset, shard.id)
        if staged.covers():
            for span in staged.ranges():
                yield _skipped(dataset, shard.id, span)
            yield _end_batch(shard.id, staged.ends[0])
            return
        # A short fragment is left out: it may be the tail of a read that ended elsewhere, and would
        # shift the fragments of this read.
        full = {
            start: stop
            for start, stop in staged.fragments.items()
            if stop - start == dataset.fragment_rows
        }
        reader = _FragmentReader(dataset, shard, full, started)
        for attempt in range(1, READS + 1):
            try:
                yield from reader.batches()
                return
            except ShardError:
                if attempt == READS:
                    raise
                time.sleep(READ_AGAIN_S)
    except (JobError, ShardError, StorageError) as error:
        event = ShardEvent(_kind_of_failure(error), shard.id, message=str(error))
        yield FragmentBatch(event)


def _kind_of_failure(error: VitrayError) -> EventKind:
    if isinstance(error, ObjectChanged):
        return EventKind.SHARD_CHANGED
    # A JobError means that this shard lacks a passthrough column.
    is_broken = isinstance(error, (JobError, ShardError))
    return EventKind.SHARD_BROKEN if is_broken else EventKind.SHARD_FAILED


@dataclass
class _FragmentReader:
    """Divides the images of one shard into fragments.

    staged: {start: stop} of the staged fragments. sent: the starts of the batches that an earlier
    attempt yielded. started: when the images of the next batch began to be read.
    """

    dataset: Dataset
    shard: Shard
    staged: dict[int, int]
    started: float
    sent: set[int] = field(default_factory=set)

    def batches(self) -> Iterator[FragmentBatch]:
        """The batches that were not sent yet, then the end. Raises what read_shard raises."""
        rows = self.dataset.fragment_rows
        items = list[Encoded]()
        start = 0
        for item in read_shard(self.shard, self.dataset.job, self._is_wanted):
            position = item.total if isinstance(item, End) else item.index
            boundary = position // rows * rows
            while start + rows <= boundary:  # the range is complete, or was skipped completely
                yield from self._batch((start, start + rows), items)
                items = []
                start += rows
            if isinstance(item, End):
                if start < item.total:
                    yield from self._batch((start, item.total), items)
                yield _end_batch(self.shard.id, item)
                return
            items.append(item)
            if item.index == start + rows - 1:
                yield from self._batch((start, start + rows), items)
                items = []
                start += rows
                self.started = time.perf_counter()
        raise ShardError(f"{self.shard.url}: the source ended without the number of its images")

    def _is_wanted(self, index: int) -> bool:
        rows = self.dataset.fragment_rows
        return self.staged.get(index // rows * rows, 0) <= index

    def _batch(self, span: tuple[int, int], items: list[Encoded]) -> Iterator[FragmentBatch]:
        start, stop = span
        if start in self.sent:
            return
        if self.staged.get(start) == stop:
            self.sent.add(start)
            yield _skipped(self.dataset, self.shard.id, span)
            return
        seconds = time.perf_counter() - self.started
        self.started = time.perf_counter()
        trace("read", self.shard.id, start, stop)
        further = sum(item.further_images for item in items)
        event = ShardEvent(
            EventKind.FRAGMENT_WRITTEN,  # which is what it becomes at the end of the stages
            self.shard.id,
            start,
            stop,
            seconds={"read": seconds},
            size_bytes=sum(len(item.data or b"") for item in items),
            left_out={LeftOut.FURTHER_IMAGE: further} if further else {},
        )
        batch = FragmentBatch(event, rows=encoded_table(items, self.dataset.passthrough))
        self.sent.add(start)
        yield batch


def _end_batch(shard_id: str, end: End) -> FragmentBatch:
    event = ShardEvent(
        EventKind.SHARD_END,
        shard_id,
        total=end.total,
        message=end.note,
        left_out=end.left_out,
        image_members=end.image_members,
    )
    return FragmentBatch(event, end.truncated_at)


def _skipped(dataset: Dataset, shard_id: str, span: tuple[int, int]) -> FragmentBatch:
    fragment = read_fragment(dataset, shard_id, *span)
    if fragment is None:
        raise StorageError(
            f"{shard_id}: fragment {span[0]}-{span[1]} is damaged. Run again: it is computed again."
        )
    reasons = _reason_counts(fragment.errors)
    return FragmentBatch(ShardEvent(EventKind.FRAGMENT_SKIPPED, shard_id, *span, reasons=reasons))


def encoded_table(items: list[Encoded], passthrough: pa.Schema) -> pa.Table:
    """The rows before the decode stage: a column for each of ENCODED_TYPES.

    Passthrough columns are called `keep:<name>`.
    """
    columns: dict[str, Any] = {
        name: pa.array([getattr(item, name) for item in items], kind)
        for name, kind in ENCODED_TYPES.items()
    }
    if len(passthrough):
        for name, column in _passthrough_columns(items, passthrough).items():
            columns[f"keep:{name}"] = column
    return pa.table(columns)


def _passthrough_columns(
    items: list[Encoded], passthrough: pa.Schema
) -> dict[str, pa.ChunkedArray]:
    """The passthrough columns of the images, with the dataset's types.

    Raises ShardError for a value that does not fit its type.
    """
    rows = [item.passthrough for item in items if item.passthrough is not None]
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
    return columns


@dataclass(frozen=True, slots=True)
class _DecodedImage:
    """An image after the decode stage. turn: EXIF orientation of a JPEG left encoded, or 0."""

    item: Encoded
    outcome: Outcome
    content_hash: bytes | None
    turn: int


def decode_stage(dataset: Dataset, batch: FragmentBatch) -> FragmentBatch:
    """Encoded bytes -> good rows with a `pixels` column (uint8 H*W*3 of each image), error rows.

    A JPEG that is left to the device has its bytes in `pixels`, and in `turn` its EXIF orientation;
    `turn` is 0 for pixels.
    """
    if batch.rows is None:
        return batch
    started = time.perf_counter()
    event = batch.event
    images, pixels = _decode_images(dataset, batch.rows)
    good = [n for n, image in enumerate(images) if image.outcome.reason is None]
    good_images = [images[n] for n in good]
    columns = _image_columns(event.shard, good_images)
    for field_ in dataset.passthrough:
        columns[field_.name] = take_rows(batch.rows[f"keep:{field_.name}"], good)
    columns |= _pixel_columns(dataset, good_images, pixels)
    bad_images = [image for image in images if image.outcome.reason is not None]
    errors = pa.Table.from_pylist(
        [_error_row(event.shard, image) for image in bad_images], schema=ERROR_SCHEMA
    )
    trace("decode", event.shard, event.start, event.stop)
    event = _timed(event, "decode", started)
    further_pages = sum(image.outcome.further_pages for image in good_images)
    if further_pages:
        event = replace(event, left_out={**event.left_out, LeftOut.FURTHER_PAGE: further_pages})
    return replace(batch, rows=pa.table(columns), errors=errors, event=event)


def _decode_images(dataset: Dataset, rows: pa.Table) -> tuple[list[_DecodedImage], Any]:
    """(all images, the pixels of the good ones that the CPU decoded)."""
    spec = dataset.decode_spec
    values = zip(*(rows[name].to_pylist() for name in ENCODED_TYPES))
    items = [Encoded(*fields) for fields in values]
    device_jpegs = [left_to_device(item.data, spec) for item in items]
    on_cpu = [item for item, jpeg in zip(items, device_jpegs) if jpeg is None]
    pixels, decoded = decode(on_cpu, spec)
    outcomes = iter(decoded)
    images = list[_DecodedImage]()
    for item, jpeg in zip(items, device_jpegs):
        outcome, turn = (next(outcomes), 0) if jpeg is None else jpeg
        digest = None if item.data is None else content_hash(item.data)
        images.append(_DecodedImage(item, outcome, digest, turn))
    return images, pixels


def _image_columns(shard_id: str, images: list[_DecodedImage]) -> dict[str, Any]:
    """The columns of IMAGE_FIELDS."""
    values: dict[str, list[Any]] = {
        "shard": [shard_id] * len(images),
        "content_hash": [image.content_hash for image in images],
    }
    for name in ("key", "index", "uri"):
        values[name] = [getattr(image.item, name) for image in images]
    for name in ("width", "height", "format"):
        values[name] = [getattr(image.outcome, name) for image in images]
    return {column.name: pa.array(values[column.name], column.type) for column in IMAGE_FIELDS}


def _pixel_columns(dataset: Dataset, images: list[_DecodedImage], pixels: Any) -> dict[str, Any]:
    """The columns of PIXEL_COLUMNS that the predict stage needs."""
    if dataset.job.decode in ON_DEVICE:
        decoded = iter(pixels)
        blobs = [image.item.data if image.turn else next(decoded).tobytes() for image in images]
        turns = pa.array([image.turn for image in images], pa.int8())
        return {"pixels": pa.array(blobs, pa.large_binary()), "turn": turns}
    width = int(np.prod(pixels.shape[1:]))
    buffers = [None, pa.py_buffer(pixels)]
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(images), buffers)
    return {"pixels": column}


def _error_row(shard_id: str, image: _DecodedImage) -> dict[str, object]:
    return {
        "key": image.item.key,
        "shard": shard_id,
        "index": image.item.index,
        "uri": image.item.uri,
        "reason": image.outcome.reason,
        "message": image.outcome.message,
        "content_hash": image.content_hash,
        "size_bytes": len(image.item.data or b""),
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
    dataset: Dataset, model: Model, batch: FragmentBatch, decoder: DeviceDecoder | None = None
) -> FragmentBatch:
    """Pixels -> labels and vectors, in the dataset's schema."""
    if batch.rows is None:
        return batch
    started = time.perf_counter()
    table = batch.rows.combine_chunks()
    errors = batch.errors
    shape = (*dataset.spec.pixels.shape, 3)
    pixels: Any = None
    if decoder is not None:
        pixels, table, errors = _decode_on_device(decoder, shape, table, errors)
    elif table.num_rows:
        pixels = _pixel_view(table["pixels"].chunk(0), shape)
    if table.num_rows:
        columns = {
            name: table[name] for name in table.column_names if name not in PIXEL_COLUMNS
        } | _predicted_columns(dataset, model.predict(pixels))
        rows = pa.table(columns).select(dataset.schema.names).cast(dataset.schema)
    else:
        # empty_table() lacks lists of extension types (pyarrow 26.0).
        rows = pa.Table.from_batches([], dataset.schema)
    event = batch.event
    trace("predict", event.shard, event.start, event.stop)
    return replace(batch, rows=rows, errors=errors, event=_timed(event, "predict", started))


def _pixel_view(column: pa.Array, shape: tuple[int, ...]) -> Any:
    """uint8 [N, H, W, 3] on the column's memory."""
    size = int(np.prod(shape))
    flat = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * size :]
    return flat[: len(column) * size].reshape(len(column), *shape)


def _decode_on_device(
    decoder: DeviceDecoder, shape: tuple[int, ...], table: pa.Table, errors: pa.Table
) -> tuple[Any, pa.Table, pa.Table]:
    """(pixels of the good rows on the device, the good rows, all error rows)."""
    from vitray.models.gpu_decode import Coded

    blobs = [blob.as_buffer() for blob in table["pixels"]]
    sizes = zip(*(table[name].to_pylist() for name in ("turn", "width", "height")))
    images: list[Any] = []
    for blob, (turn, width, height) in zip(blobs, sizes):
        if turn:
            images.append(Coded(blob, turn, width, height))
        else:
            images.append(np.frombuffer(blob, np.uint8).reshape(shape))
    pixels, bad = decoder.decode(images)
    if not bad:
        return pixels, table, errors
    bad_rows = table.take(pa.array(sorted(bad), pa.int64()))
    refused = bad_rows.select(["key", "shard", "index", "uri", "content_hash"]).to_pylist()
    for row, n in zip(refused, sorted(bad)):
        row |= {"reason": bad[n].reason, "message": bad[n].message, "size_bytes": blobs[n].size}
    refused_table = pa.Table.from_pylist(refused, schema=ERROR_SCHEMA)
    good = pa.array([n for n in range(len(blobs)) if n not in bad], pa.int64())
    all_errors = pa.concat_tables([errors, refused_table]).sort_by("index")
    return pixels, table.take(good).combine_chunks(), all_errors


def _predicted_columns(dataset: Dataset, predictions: Predictions) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    if predictions.ids is not None and predictions.scores is not None:
        columns = dict(dataset.label_columns(predictions.ids, predictions.scores))
    for vector in dataset.vectors:
        values = pa.array(predictions.vectors[vector.column].ravel())
        kind = dataset.schema.field(vector.column).type
        columns[vector.column] = pa.FixedSizeListArray.from_arrays(values, type=kind)
    return columns


def write_stage(dataset: Dataset, batch: FragmentBatch) -> FragmentBatch:
    """Rows -> a staged fragment, an end -> the end marker. The result has only the event."""
    started = time.perf_counter()
    event = batch.event
    if event.kind == EventKind.SHARD_END:
        counts = (event.left_out, event.image_members)
        end = End(event.total, batch.truncated_at, event.message, *counts)
        write_end(dataset, event.shard, end)
        crash_point("stage-end", event.shard)
    if batch.rows is None or batch.errors is None:
        return FragmentBatch(event, batch.truncated_at)
    span = (event.start, event.stop)
    write_fragment(dataset, event.shard, span, batch.rows, batch.errors, event.left_out)
    trace("stage", event.shard, event.start, event.stop)
    reasons = _reason_counts(batch.errors)
    return FragmentBatch(replace(_timed(event, "stage", started), reasons=reasons))


def commit_or_error(dataset: Dataset, shard: Shard) -> Commit | VitrayError | None:
    """What commit_shard returns, or the VitrayError that it raised.

    As a return value the error keeps its type on the way to another process.
    """
    started = time.perf_counter()
    try:
        commit = commit_shard(dataset, shard)
        return commit and replace(commit, seconds=time.perf_counter() - started)
    except VitrayError as error:
        return error


def _timed(event: ShardEvent, stage: str, started: float) -> ShardEvent:
    return replace(event, seconds={**event.seconds, stage: time.perf_counter() - started})


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
