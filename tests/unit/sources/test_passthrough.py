"""Passthrough columns: every Arrow type that Parquet can store is copied unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from support.passthrough import array_of, as_read, good_rows, kept_rows, plain, through


def test_types_that_pyarrow_widens_pass_through_as_pyarrow_reads_them(tmp_path: Path) -> None:
    columns = {
        "t": pa.array([1, None, 3], pa.time32("s")),
        "d": pa.array([0, 86_400_000, None], pa.date64()),
    }
    table = pa.table({**columns, "s": pa.array([1 << 40, None, -1], pa.timestamp("s"))})
    (row,) = kept_rows(through(tmp_path, [table]), ["t", "d", "s"])
    assert row.equals(as_read(table))


def test_bits_of_nan_stay_as_they_are(tmp_path: Path) -> None:
    bits = np.array([0x7FF8000000000001, 0xFFF8000000000000, 0x7FF0000000000001], np.uint64)
    (row,) = kept_rows(through(tmp_path, [pa.table({"n": pa.array(bits.view("f8"))})]), ["n"])
    assert row["n"].to_numpy().view(np.uint64).tolist() == bits.tolist()


def test_years_beyond_9999_pass_through(tmp_path: Path) -> None:
    values = pa.array([2**31 - 1, -(2**31), 0], pa.int32()).view(pa.date32())
    far = pa.array([2**62, -(2**62), None], pa.timestamp("us"))
    (row,) = kept_rows(through(tmp_path, [pa.table({"day": values, "at": far})]), ["day", "at"])
    assert row["day"].cast(pa.int32()).to_pylist() == [2**31 - 1, -(2**31), 0]
    assert row["at"].cast(pa.int64()).to_pylist() == [2**62, -(2**62), None]


def test_columns_with_odd_names_pass_through(tmp_path: Path) -> None:
    table = pa.table({"a.b": [1, 2], "a": [{"b": 3}, {"b": 4}], "ü ☃": [5, 6], "[x]": [7, 8]})
    (row,) = kept_rows(through(tmp_path, [table]), table.column_names)
    assert row.equals(table)


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.int32(), pa.int64(), pa.int64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.date32(), pa.date32(), pa.date32()),
        (pa.timestamp("ms"), pa.timestamp("ns"), pa.timestamp("ns")),
        (pa.float32(), pa.float64(), pa.float64()),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.list_(pa.int8()), pa.list_(pa.int32()), pa.list_(pa.int32())),
        (pa.null(), pa.int16(), pa.int16()),
        (pa.list_(pa.null()), pa.list_(pa.string()), pa.list_(pa.string())),
    ],
    ids=str,
)
def test_files_of_different_widths_meet_in_one_type(
    tmp_path: Path, first: pa.DataType, second: pa.DataType, both: pa.DataType
) -> None:
    rng = np.random.default_rng(1)
    arrays = {
        pa.null(): pa.nulls(4),
        pa.list_(pa.null()): pa.array([[], None, [], []], pa.list_(pa.null())),
        pa.timestamp("ms"): pa.array([1, 2, None, 3], pa.timestamp("ms")),
        pa.timestamp("ns"): pa.array([1, 2, None, 3], pa.timestamp("ns")),
    }
    small, other = (
        arrays[kind] if kind in arrays else array_of(kind, 4, rng) for kind in (first, second)
    )
    tables = [pa.table({"value": small}), pa.table({"value": other})]
    rows = kept_rows(through(tmp_path, tables), ["value"])
    assert [table["value"].type for table in rows] == [both, both]
    for table, values in zip(rows, (small, other)):
        assert (
            plain(table)["value"]
            .combine_chunks()
            .equals(
                good_rows(plain(pa.table({"value": values})))["value"].cast(both).combine_chunks()
            )
        )
