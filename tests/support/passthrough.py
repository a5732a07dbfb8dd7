"""Arrow columns of every type, and a model of zeros to run them through."""

from __future__ import annotations

import decimal
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from factories import hand_made
from vitray.arrow_types import without_list_views
from vitray.dataset import Dataset, commit_shard, resolve_dataset
from vitray.models import Predictions
from vitray.operations.validation import validate
from vitray.pipeline.stages import (
    DecodedBlock,
    EncodedFragment,
    decode_stage,
    predict_stage,
    read_stage,
    write_stage,
)
from vitray.schema import VectorColumn
from vitray.sources import list_shards, passthrough_schema

TEXTS = (pa.string(), pa.large_string(), pa.string_view())
BYTES = (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3))


def array_of(
    kind: pa.DataType, count: int, rng: np.random.Generator, nulls: bool = True
) -> pa.Array:
    """Random values of any type: extremes, nulls, empty and long ones."""
    mask = pa.array(rng.random(count) < (0.25 if nulls else 0.0))

    def with_nulls(array: pa.Array) -> pa.Array:
        return pa.array(
            [None if is_null else value for value, is_null in zip(array, mask.to_pylist())],
            array.type,
        )

    if pa.types.is_null(kind):
        return pa.nulls(count)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, array_of(kind.storage_type, count, rng, nulls))
    if pa.types.is_dictionary(kind):
        values = array_of(kind.value_type, 3, rng, nulls=False).unique()
        indices = pa.array(rng.integers(0, len(values), count), mask=np.array(mask)).cast(
            kind.index_type
        )
        return pa.DictionaryArray.from_arrays(indices, values)
    if pa.types.is_boolean(kind):
        return pa.array(rng.random(count) < 0.5, mask=np.array(mask))
    if pa.types.is_integer(kind) or pa.types.is_temporal(kind):
        width = kind.bit_width // 8
        name = f"{'u' if pa.types.is_unsigned_integer(kind) else 'i'}{width}"
        extremes = np.iinfo(name)
        few = [
            extremes.min,
            extremes.max,
            0,
            int(rng.integers(0, 100)),
            min(86_399_999, extremes.max),
        ]
        values = rng.choice(np.array(few, name), count)
        if pa.types.is_time(kind):
            values = np.abs(values) % 86_400_000
        return pa.array(values.astype(name), mask=np.array(mask)).view(kind)
    if pa.types.is_floating(kind):
        values = rng.choice([0.0, -0.0, np.inf, -np.inf, 1.5, float(rng.normal())], count)
        return pa.array(values.astype(f"f{kind.bit_width // 8}"), mask=np.array(mask))
    if pa.types.is_decimal(kind):
        largest = decimal.Decimal((0, (9,) * kind.precision, -kind.scale))
        texts = [
            [largest, largest.copy_negate(), decimal.Decimal(0)][n]
            for n in rng.integers(0, 3, count)
        ]
        return with_nulls(pa.array(texts, kind))
    if pa.types.is_fixed_size_binary(kind):
        return with_nulls(pa.array([rng.bytes(kind.byte_width) for _ in range(count)], kind))
    if kind in TEXTS:
        texts = ["", "x", "naïve ☃ 𝒳", "long " * 40, str(rng.integers(1 << 40))]
        return with_nulls(pa.array([texts[n] for n in rng.integers(0, 5, count)], kind))
    if kind in BYTES:
        return with_nulls(pa.array([rng.bytes(int(n)) for n in rng.integers(0, 40, count)], kind))
    if pa.types.is_struct(kind):
        children = [array_of(field.type, count, rng) for field in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind), mask=mask)
    if pa.types.is_fixed_size_list(kind):
        flat = array_of(kind.value_type, count * kind.list_size, rng)
        return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask)
    lengths = rng.integers(0, 4, count)
    is_large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    offsets = pa.array([0, *np.cumsum(lengths).tolist()], pa.int64() if is_large else pa.int32())
    total = int(lengths.sum())
    if pa.types.is_map(kind):
        keys, items = (
            array_of(kind.key_type, total, rng, nulls=False),
            array_of(kind.item_type, total, rng),
        )
        return pa.MapArray.from_arrays(offsets, keys, items)
    flat = array_of(kind.value_type, total, rng)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        view = pa.LargeListViewArray if is_large else pa.ListViewArray
        return view.from_arrays(offsets[:-1], pa.array(lengths, offsets.type), flat, mask=mask)
    return (pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray).from_arrays(
        offsets, flat, mask=mask
    )


def without_dictionaries(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, to compare values whose dictionaries have another order."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(without_dictionaries(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, without_dictionaries(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(without_dictionaries(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(without_dictionaries(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(without_dictionaries(kind.value_type))
    return kind


class ZeroModel:
    """Every image is class 0 with the same vector."""

    def predict(self, pixels: np.ndarray) -> Predictions:
        count = len(pixels)
        ids = np.tile(np.arange(2, dtype=np.int32), (count, 1))
        vectors = np.full((count, hand_made.DIMENSION), 0.5, np.float32)
        return Predictions(ids, np.full((count, 2), 0.5, np.float32), {"embedding": vectors})


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()
BAD_EVERY = 5  # of this many rows, one image is bad


def through(folder: Path, tables: list[pa.Table], in_processes: bool = False) -> Dataset:
    """These Parquet files after all stages and commits.

    Fragments are decoded and predicted two by two. in_processes: what was decoded is pickled, as on
    its way from a decoder process.
    """
    source = folder / "in"
    source.mkdir()
    for n, table in enumerate(tables):
        images = [b"no image" if row % BAD_EVERY == 3 else PICTURE for row in range(table.num_rows)]
        pq.write_table(
            table.append_column("image", pa.array(images, pa.binary())),
            source / f"{n}.parquet",
            row_group_size=7,
        )
    names = tables[0].column_names
    job = hand_made.job_of(
        folder, source=str(source), keep=names, image_column="image", source_rules=2
    )
    shards = list_shards(job, []).shards
    vector = VectorColumn("embedding", hand_made.DIMENSION, None, "cls", True, "float32")
    kept = passthrough_schema(shards, job)
    dataset = resolve_dataset(
        job, hand_made.spec_of("m"), [vector], kept, "2026-01-01T00:00:00+00:00"
    )
    for shard in shards:
        fragments = list(read_stage(dataset, shard))
        for first in range(0, len(fragments), 2):
            pair = fragments[first : first + 2]
            assert all(isinstance(item, EncodedFragment) for item in pair), pair
            block = decode_stage(dataset, pair)
            if in_processes:
                block = DecodedBlock(pickle.loads(pickle.dumps(block.fragments)), block.pixels)
            for fragment in predict_stage(dataset, ZeroModel(), block):
                write_stage(dataset, fragment)
        assert commit_shard(dataset, shard) is not None
    checked = validate(dataset.out, inputs=False)
    assert checked.ok, checked
    return dataset


def kept_rows(dataset: Dataset, names: list[str]) -> list[pa.Table]:
    return [
        pq.read_table(path).select(names)
        for path in sorted(Path(dataset.out, "data").glob("*.parquet"))
    ]


def as_read(table: pa.Table) -> pa.Table:
    """What pyarrow itself gives back of a table that it wrote."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=7)
    return pq.read_table(pa.BufferReader(sink.getvalue()))


def good_rows(table: pa.Table) -> pa.Table:
    """Those whose image is one, as slices: pyarrow cannot `take` from view types."""
    return pa.concat_tables(
        [table.slice(n, 1) for n in range(table.num_rows) if n % BAD_EVERY != 3]
    )


def plain(table: pa.Table) -> pa.Table:
    """The values in types that pyarrow can compare."""
    columns = [without_list_views(column) for column in table.columns]
    return pa.table(
        [column.combine_chunks().cast(without_dictionaries(column.type)) for column in columns],
        names=table.column_names,
    )
