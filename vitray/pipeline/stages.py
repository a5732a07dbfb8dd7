"""The four steps of the line, as functions of one fragment: read, decode, predict, stage. No Ray in
here.

With decode: gpu or hybrid the decode step leaves plain JPEGs as they are, and the predict step
decodes them where the model is.

A `FragmentBatch` is one fragment on its way. It is one row of a Ray block, so that no block
boundary can cut it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vitray.crash import crash_point
from vitray.dataset import (
    Commit,
    Dataset,
    commit_shard,
    read_fragment,
    staged_intact,
    write_end,
    write_fragment,
)
from vitray.decoding.decode import ON_DEVICE, decode, decode_bytes, fit_size, left_to_device
from vitray.errors import JobError, ObjectChanged, ShardError, StorageError, VitrayError, one_line
from vitray.left_out import LeftOut
from vitray.models import Model, Predictions
from vitray.schema import (
    ERROR_SCHEMA,
    IMAGE_FIELDS,
    Encoded,
    End,
    Shard,
    ShardEvent,
    content_hash,
    ipc_bytes,
    ipc_table,
    passthrough_table,
    take_rows,
    with_type,
)
from vitray.sources import read_shard, require_passthrough

if TYPE_CHECKING:
    from vitray.models.gpu_decode import DeviceDecoder

READS = 3  # of a shard whose bytes make no sense: a proxy may have spoilt them
READ_AGAIN_S = 0.5
COUNTS = (
    "reasons",
    "seconds",
    "left_out",
    "image_members",
)  # of a ShardEvent: dictionaries, JSON on the way
FRAGMENT_BATCH_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("kind", "shard", "message", *COUNTS)]
    + [(name, pa.int64()) for name in ("start", "stop", "total", "truncated_at", "size_bytes")]
    + [(name, pa.large_binary()) for name in ("rows", "errors")]
)


@dataclass(frozen=True, slots=True)
class FragmentBatch:
    """An event with what it is about: rows and errors are Arrow tables while they travel, None at
    the end of the line.
    """

    event: ShardEvent
    truncated_at: int | None = None
    rows: pa.Table | None = None
    errors: pa.Table | None = None

    def pack(self) -> pa.Table:
        """As one row of a Ray block."""
        r = self.event
        values = [
            [r.kind], [r.shard], [r.message], *([json.dumps(getattr(r, name))] for name in COUNTS),
            [r.start], [r.stop], [r.total], [self.truncated_at], [r.size_bytes],
            *([None if table is None else ipc_bytes(table)] for table in (self.rows, self.errors)),
        ]  # fmt: skip
        return pa.Table.from_arrays(
            [pa.array(v, f.type) for v, f in zip(values, FRAGMENT_BATCH_SCHEMA)],
            schema=FRAGMENT_BATCH_SCHEMA,
        )


def unpack(block: pa.Table) -> Iterator[FragmentBatch]:
    """The batches in a block; tables are views on the block's memory."""
    for at in range(block.num_rows):
        row = {name: block[name][at] for name in FRAGMENT_BATCH_SCHEMA.names}
        plain = {name: row[name].as_py() for name in FRAGMENT_BATCH_SCHEMA.names[:-2]}
        truncated_at = plain.pop("truncated_at")
        plain |= {name: json.loads(plain[name]) for name in COUNTS}
        rows, errors = (
            ipc_table(row[name].as_buffer()) if row[name].is_valid else None
            for name in ("rows", "errors")
        )
        yield FragmentBatch(ShardEvent(**plain), truncated_at, rows, errors)


def read_step(dataset: Dataset, shard: Shard) -> Iterator[FragmentBatch]:
    """A shard as batches of encoded bytes, one for each range of fragment_rows, then its end.

    A range that is staged already becomes an event: it is not decoded or predicted again. A shard
    that cannot be read ends with an event that says so ("broken": after READS tries) and never
    raises.
    """
    started = time.perf_counter()
    try:
        require_passthrough(shard, dataset.job, dataset.passthrough)
        there = staged_intact(dataset, shard.id)
        if there.covers():
            for span in there.ranges():
                yield _was_staged(dataset, shard.id, span)
            yield _end_batch(shard.id, there.ends[0])
            return
        # not a short one: it may be the tail of a reading that ended elsewhere, and would cut this
        # one's fragments
        full = {
            start: stop
            for start, stop in there.fragments.items()
            if stop - start == dataset.fragment_rows
        }
        sent: set[int] = set()
        for attempt in range(1, READS + 1):
            try:
                yield from _fragments(dataset, shard, full, sent, started)
                return
            except ShardError:
                if attempt == READS:
                    raise
                time.sleep(READ_AGAIN_S)
    except (
        JobError,
        ShardError,
        StorageError,
    ) as error:  # JobError: this shard lacks a passthrough column
        is_broken = isinstance(error, (JobError, ShardError))
        kind = (
            "changed" if isinstance(error, ObjectChanged) else "broken" if is_broken else "failed"
        )
        yield FragmentBatch(ShardEvent(kind, shard.id, message=str(error)))


def _fragments(
    dataset: Dataset, shard: Shard, there: dict[int, int], sent: set[int], started: float
) -> Iterator[FragmentBatch]:
    """there: {start: stop} of what is staged; sent: the starts that an earlier try yielded, which
    grows.
    """
    rows, held, at = dataset.fragment_rows, list[Encoded](), 0

    def batch(start: int, stop: int) -> Iterator[FragmentBatch]:
        nonlocal started
        if start in sent:
            return
        if there.get(start) == stop:
            sent.add(start)
            yield _was_staged(dataset, shard.id, (start, stop))
            return
        seconds = {"read": time.perf_counter() - started}
        started = time.perf_counter()
        trace("read", shard.id, start, stop)
        size = sum(len(item.data or b"") for item in held)
        further = sum(item.further_images for item in held)
        left_out: dict[str, int] = {LeftOut.FURTHER_IMAGE: further} if further else {}
        event = ShardEvent(
            "fragment", shard.id, start, stop, seconds=seconds, size_bytes=size, left_out=left_out
        )
        whole = FragmentBatch(event, rows=_encoded_table(held, dataset.passthrough))
        sent.add(start)
        yield whole

    def is_wanted(index: int) -> bool:
        start = index // rows * rows
        return there.get(start, 0) <= index

    for item in read_shard(shard, dataset.job, is_wanted):
        boundary = (item.total if isinstance(item, End) else item.index) // rows * rows
        while at + rows <= boundary:  # the range is whole, or was skipped whole
            yield from batch(at, at + rows)
            held, at = [], at + rows
        if isinstance(item, End):
            if at < item.total:
                yield from batch(at, item.total)
            yield _end_batch(shard.id, item)
            return
        held.append(item)
        if item.index == at + rows - 1:
            yield from batch(at, at + rows)
            held, at = [], at + rows
            started = time.perf_counter()
    raise ShardError(f"{shard.url}: the source ended without saying how many images it holds")


def _end_batch(shard_id: str, end: End) -> FragmentBatch:
    event = ShardEvent(
        "end",
        shard_id,
        total=end.total,
        message=end.note,
        left_out=end.left_out,
        image_members=end.image_members,
    )
    return FragmentBatch(event, end.truncated_at)


def _was_staged(dataset: Dataset, shard_id: str, span: tuple[int, int]) -> FragmentBatch:
    fragment = read_fragment(dataset, shard_id, *span)
    if fragment is None:
        raise StorageError(
            f"{shard_id}: fragment {span[0]}-{span[1]} is damaged. Run again; it is made anew."
        )
    return FragmentBatch(ShardEvent("staged", shard_id, *span, reasons=_counts(fragment.errors)))


def _encoded_table(items: list[Encoded], passthrough: pa.Schema) -> pa.Table:
    """The images as a table with the columns index, key, uri, reason, message, data and
    `keep:<name>`.
    """
    kinds = {
        "index": pa.int32(),
        "data": pa.large_binary(),
        **dict.fromkeys(("key", "uri", "reason", "message"), pa.string()),
    }
    columns = {
        name: pa.array([getattr(item, name) for item in items], kind)
        for name, kind in kinds.items()
    }
    passthrough_columns = _passthrough_columns(items, passthrough) if len(passthrough) else {}
    return pa.table(
        {**columns, **{f"keep:{name}": column for name, column in passthrough_columns.items()}}
    )


def _passthrough_columns(
    items: list[Encoded], passthrough: pa.Schema
) -> dict[str, pa.ChunkedArray]:
    """The passthrough columns of the images with the dataset's types. Raises ShardError for a value
    that does not go into its type.
    """
    rows = [item.passthrough for item in items if item.passthrough is not None]
    table = passthrough_table(rows, passthrough)
    columns = {}
    for at, field in enumerate(passthrough):
        try:
            columns[field.name] = with_type(table.column(at), field.type)
        except (pa.ArrowException, OverflowError) as error:
            raise ShardError(
                f"a value of column `{field.name}` does not fit the dataset's {field.type}: "
                f"{one_line(error)}"
            ) from error
    return columns


def decode_step(dataset: Dataset, batch: FragmentBatch) -> FragmentBatch:
    """Encoded bytes -> good rows with a `pixels` column (uint8 H*W*3 of each image), and error
    rows.

    Where plain JPEGs are left to the device, their bytes stand in `pixels`, and in `turn` their
    EXIF orientation (0: it is pixels).
    """
    if batch.rows is None:
        return batch
    started = time.perf_counter()
    shard = batch.event.shard
    table = batch.rows
    data = table["data"].to_pylist()
    plain = [table[name].to_pylist() for name in ("index", "key", "uri", "reason", "message")]
    items = [Encoded(i, k, u, d, r, m) for i, k, u, r, m, d in zip(*plain, data)]
    left = [left_to_device(d, dataset.decode_spec) for d in data]
    pixels, decoded = decode(
        [item for item, plain in zip(items, left) if plain is None], dataset.decode_spec
    )
    rest = iter(decoded)
    outcomes = [next(rest) if plain is None else plain[0] for plain in left]
    hashes = [None if d is None else content_hash(d) for d in data]
    good = [n for n, o in enumerate(outcomes) if o.reason is None]
    bad = [n for n, o in enumerate(outcomes) if o.reason is not None]
    values = {name: [getattr(items[n], name) for n in good] for name in ("key", "index", "uri")}
    values |= {
        name: [getattr(outcomes[n], name) for n in good] for name in ("width", "height", "format")
    }
    values |= {"shard": [shard] * len(good), "content_hash": [hashes[n] for n in good]}
    columns = {f.name: pa.array(values[f.name], f.type) for f in IMAGE_FIELDS}
    columns |= {c.name: take_rows(table[f"keep:{c.name}"], good) for c in dataset.passthrough}
    if dataset.job.decode in ON_DEVICE:
        rows = iter(pixels)
        columns["pixels"] = pa.array(
            [data[n] if left[n] else next(rows).tobytes() for n in good], pa.large_binary()
        )
        columns["turn"] = pa.array(
            [plain[1] if plain else 0 for plain in map(left.__getitem__, good)], pa.int8()
        )
    else:
        width = int(np.prod(pixels.shape[1:]))
        columns["pixels"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(good), [None, pa.py_buffer(pixels)]
        )
    errors = pa.Table.from_pylist(
        [
            {"key": items[n].key, "shard": shard, "index": items[n].index, "uri": items[n].uri, "reason": outcomes[n].reason,
             "message": outcomes[n].message, "content_hash": hashes[n], "size_bytes": len(data[n] or b"")}
            for n in bad
        ],
        schema=ERROR_SCHEMA,
    )  # fmt: skip
    trace("decode", shard, batch.event.start, batch.event.stop)
    further_pages = sum(outcomes[n].further_pages for n in good)
    event = _timed(batch.event, "decode", started)
    if further_pages:
        event = replace(event, left_out={**event.left_out, LeftOut.FURTHER_PAGE: further_pages})
    return replace(batch, rows=pa.table(columns), errors=errors, event=event)


def open_device_decoder(dataset: Dataset, threads: int) -> DeviceDecoder | None:
    """What `predict_step` decodes plain JPEGs with; None where decode_step has left none. Raises
    ModelError without a GPU.
    """
    spec = dataset.decode_spec
    if spec.mode not in ON_DEVICE:
        return None
    from vitray.models.gpu_decode import open_decoder

    fit = partial(fit_size, pixels=spec.pixels)
    return open_decoder(
        spec.pixels, partial(decode_bytes, spec=spec), fit, threads, shares=spec.mode == "hybrid"
    )


def predict_step(
    dataset: Dataset, model: Model, batch: FragmentBatch, decoder: DeviceDecoder | None = None
) -> FragmentBatch:
    """Pixels -> labels and vectors, in the dataset's schema."""
    if batch.rows is None:
        return batch
    started = time.perf_counter()
    table, errors = batch.rows.combine_chunks(), batch.errors
    height, width = dataset.spec.pixels.shape
    if decoder is not None:
        pixels, table, errors = _decode_there(decoder, (height, width, 3), table, errors)
    elif table.num_rows:
        column = table["pixels"].chunk(0)
        flat = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * height * width * 3 :]
        pixels = flat[: len(column) * height * width * 3].reshape(len(column), height, width, 3)
    if table.num_rows:
        found = model.predict(pixels)
        columns = {
            name: table[name] for name in table.column_names if name not in ("pixels", "turn")
        }
        rows = (
            pa.table({**columns, **_predicted(dataset, found)})
            .select(dataset.schema.names)
            .cast(dataset.schema)
        )
    else:
        rows = pa.Table.from_batches(
            [], dataset.schema
        )  # empty_table() lacks lists of extension types (pyarrow 26.0)
    trace("predict", batch.event.shard, batch.event.start, batch.event.stop)
    return replace(batch, rows=rows, errors=errors, event=_timed(batch.event, "predict", started))


def _decode_there(
    decoder: DeviceDecoder, shape: tuple[int, ...], table: pa.Table, errors: pa.Table
) -> tuple[Any, pa.Table, pa.Table]:
    """Pixels on the device of the rows that are good, those rows, and the error rows with those
    that are not.
    """
    from vitray.models.gpu_decode import Coded

    blobs = [blob.as_buffer() for blob in table["pixels"]]
    plain = zip(blobs, *(table[name].to_pylist() for name in ("turn", "width", "height")))
    images = [
        Coded(b, t, w, h) if t else np.frombuffer(b, np.uint8).reshape(shape)
        for b, t, w, h in plain
    ]
    pixels, bad = decoder.decode(images)
    if not bad:
        return pixels, table, errors
    refused = (
        table.take(pa.array(sorted(bad), pa.int64()))
        .select(["key", "shard", "index", "uri", "content_hash"])
        .to_pylist()
    )
    said = [
        {"reason": bad[n].reason, "message": bad[n].message, "size_bytes": blobs[n].size}
        for n in sorted(bad)
    ]
    more = pa.Table.from_pylist(
        [{**row, **why} for row, why in zip(refused, said)], schema=ERROR_SCHEMA
    )
    good = table.take(
        pa.array([n for n in range(len(blobs)) if n not in bad], pa.int64())
    ).combine_chunks()
    return pixels, good, pa.concat_tables([errors, more]).sort_by("index")


def _predicted(dataset: Dataset, found: Predictions) -> dict[str, pa.Array]:
    columns: dict[str, pa.Array] = {}
    if found.ids is not None and found.scores is not None:
        columns = dataset.label_columns(found.ids, found.scores)
    for v in dataset.vectors:
        values = pa.array(found.vectors[v.column].ravel())
        columns[v.column] = pa.FixedSizeListArray.from_arrays(
            values, type=dataset.schema.field(v.column).type
        )
    return columns


def stage_step(dataset: Dataset, batch: FragmentBatch) -> FragmentBatch:
    """Rows -> a staged fragment, an end -> the tail; what goes on is the event alone."""
    started, event = time.perf_counter(), batch.event
    if event.kind == "end":
        counts = (event.left_out, event.image_members)
        write_end(
            dataset, event.shard, End(event.total, batch.truncated_at, event.message, *counts)
        )
        crash_point("stage-end", event.shard)
    if batch.rows is None or batch.errors is None:
        return FragmentBatch(event, batch.truncated_at)
    span = (event.start, event.stop)
    write_fragment(dataset, event.shard, span, batch.rows, batch.errors, event.left_out)
    trace("stage", event.shard, event.start, event.stop)
    return FragmentBatch(replace(_timed(event, "stage", started), reasons=_counts(batch.errors)))


def commit_step(dataset: Dataset, shard: Shard) -> Commit | VitrayError | None:
    """What commit_shard says or raises: an error that was unpickled by another process would have
    lost its type.
    """
    started = time.perf_counter()
    try:
        commit = commit_shard(dataset, shard)
        return commit and replace(commit, seconds=time.perf_counter() - started)
    except VitrayError as error:
        return error


def _timed(event: ShardEvent, step: str, started: float) -> ShardEvent:
    return replace(event, seconds={**event.seconds, step: time.perf_counter() - started})


def _counts(errors: pa.Table) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in errors["reason"].to_pylist():
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def trace(step: str, shard: str, start: int, stop: int) -> None:
    """The crash point of a step; one JSON line for each fragment that leaves it, in the directory
    VITRAY_TRACE: what, where, when.
    """
    crash_point(step, shard)
    folder = os.environ.get("VITRAY_TRACE")
    if folder:
        line = {
            "step": step,
            "shard": shard,
            "start": start,
            "stop": stop,
            "pid": os.getpid(),
            "at": time.time(),
        }
        with open(os.path.join(folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
