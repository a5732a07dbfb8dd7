"""Passthrough columns: every Arrow type that Parquet can store is copied unchanged."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from support.passthrough import (
    BYTES,
    TEXTS,
    array_of,
    as_read,
    good_rows,
    kept_rows,
    plain,
    through,
)

UNITS = ("s", "ms", "us", "ns")
INTEGERS = (
    pa.int8(),
    pa.int16(),
    pa.int32(),
    pa.int64(),
    pa.uint8(),
    pa.uint16(),
    pa.uint32(),
    pa.uint64(),
)
TEMPORAL = (
    pa.date32(),
    pa.time32("ms"),
    pa.time64("us"),
    pa.time64("ns"),
    *(
        pa.timestamp(unit) for unit in UNITS[1:]
    ),  # Parquet has no seconds: pyarrow makes them milliseconds
    *(pa.timestamp(unit, "Europe/Berlin") for unit in UNITS[1:]),
    *(pa.duration(unit) for unit in UNITS),
)
FLOATS = (pa.float16(), pa.float32(), pa.float64())
DECIMALS = (pa.decimal32(9, 2), pa.decimal64(18, 5), pa.decimal128(38, 10), pa.decimal256(76, 0))

DICTIONARIES = (
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
    pa.dictionary(pa.int16(), pa.binary()),
)
EXTENSIONS = (pa.uuid(), pa.bool8(), pa.json_(), pa.fixed_shape_tensor(pa.int16(), [2]))
LEAVES = (
    pa.bool_(),
    *INTEGERS,
    *TEMPORAL,
    *FLOATS,
    *DECIMALS,
    *TEXTS,
    *BYTES,
    *DICTIONARIES,
    *EXTENSIONS,
)


def nested(inner: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.DataType]:
    keys = st.sampled_from((pa.string(), pa.int32(), pa.date32()))
    return st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        inner.map(pa.list_view),
        inner.map(pa.large_list_view),
        inner.map(lambda kind: pa.list_(kind, 2)),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda kinds: pa.struct([(f"f{n}", kind) for n, kind in enumerate(kinds)])
        ),
        st.tuples(keys, inner).map(lambda pair: pa.map_(*pair)),
    )


TYPES = st.recursive(st.sampled_from(LEAVES), nested, max_leaves=4)


@pytest.mark.parametrize("kind", LEAVES, ids=str)
def test_every_plain_type_passes_through_equal(tmp_path: Path, kind: pa.DataType) -> None:
    check(tmp_path, kind, seed=1, count=23, in_processes=False)


@pytest.mark.timeout(300)
@settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    kind=TYPES, seed=st.integers(0, 1 << 32), count=st.integers(1, 40), in_processes=st.booleans()
)
@example(kind=pa.map_(pa.string(), pa.list_(pa.string_view())), seed=3, count=20, in_processes=True)
@example(kind=pa.list_(pa.uuid()), seed=0, count=26, in_processes=False)
@example(kind=pa.list_(pa.uuid()), seed=0, count=26, in_processes=True)
@example(kind=pa.list_view(pa.string_view()), seed=4, count=20, in_processes=False)
@example(kind=pa.list_(pa.list_view(pa.int16()), 2), seed=6, count=20, in_processes=True)
@example(
    kind=pa.map_(pa.string(), pa.large_list_view(pa.list_view(pa.uuid()))),
    seed=7,
    count=20,
    in_processes=False,
)
@example(
    kind=pa.struct([("f", pa.dictionary(pa.int32(), pa.string()))]),
    seed=5,
    count=20,
    in_processes=True,
)
def test_every_type_passes_through_equal_at_any_depth(
    kind: pa.DataType, seed: int, count: int, in_processes: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder), kind, seed, count, in_processes)


def check(folder: Path, kind: pa.DataType, seed: int, count: int, in_processes: bool) -> None:
    rng = np.random.default_rng(seed)
    try:
        table = as_read(
            pa.table(
                {"value": pa.chunked_array([array_of(kind, count, rng), array_of(kind, 3, rng)])}
            )
        )
        is_stable = as_read(table).equals(table)
    except pa.ArrowException:  # what Parquet cannot store
        assume(False)
    assume(is_stable)  # else pyarrow itself returns other values
    dataset = through(folder, [table], in_processes)
    (row,) = kept_rows(dataset, ["value"])
    assert row["value"].type == table["value"].type
    assert plain(row).equals(good_rows(plain(table)).combine_chunks())
