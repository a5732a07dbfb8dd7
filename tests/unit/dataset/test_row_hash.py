"""The hash of a file's rows depends on their values, and on nothing else."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.dataset_parts import FACTS, KEPT, VECTOR, D, job_for, rows_of
from vitray.dataset import Dataset, RowsDigest
from vitray.schema import VectorColumn


def digest_of(tables: Iterable[pa.Table]) -> str:
    digest = RowsDigest()
    for table in tables:
        digest.add(table)
    return digest.hexdigest()


def wide_dataset() -> Dataset:
    vectors = (VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16"))
    return Dataset("/nowhere", job_for("/nowhere"), FACTS, vectors, KEPT, 4)


WIDE = rows_of(wide_dataset(), "s", range(2500))
WIDE_DIGEST = digest_of([WIDE])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2500), max_size=12))
def test_the_hash_of_rows_does_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 2500]
    assert digest_of(WIDE.slice(a, b - a) for a, b in itertools.pairwise(edges)) == WIDE_DIGEST


@pytest.mark.parametrize("row_group_size", [1, 7, 1023, 1025, 5000])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_hash_of_rows_survives_parquet(row_group_size: int, dictionary: bool) -> None:
    rows, sink = WIDE.slice(0, 40 if row_group_size == 1 else 2500), io.BytesIO()
    pq.write_table(rows, sink, row_group_size=row_group_size, use_dictionary=dictionary)
    file = pq.ParquetFile(sink)
    batches = (pa.Table.from_batches([batch]) for batch in file.iter_batches(batch_size=333))
    assert digest_of(batches) == digest_of([file.read()]) == digest_of([rows])


def test_the_hash_of_rows_does_not_depend_on_dictionaries_or_on_bytes_behind_a_null() -> None:
    no_dictionary = WIDE.set_column(6, "format", WIDE["format"].cast(pa.string()))
    turned = pa.DictionaryArray.from_arrays(
        pa.array([2 - i % 3 for i in range(2500)], pa.int8()), ["webp", "png", "jpeg"]
    )
    assert (
        digest_of([no_dictionary])
        == digest_of([WIDE.set_column(6, "format", turned)])
        == WIDE_DIGEST
    )
    valid, values = (
        pa.py_buffer(bytes([0b101])),
        pa.py_buffer(np.array([1, 99, 3], np.int16).tobytes()),
    )
    dirty = pa.Array.from_buffers(pa.int16(), 3, [valid, values])
    assert digest_of([pa.table({"a": dirty})]) == digest_of(
        [pa.table({"a": pa.array([1, None, 3], pa.int16())})]
    )


@pytest.mark.parametrize("name", WIDE.schema.names)
def test_the_hash_of_rows_changes_with_any_value(name: str) -> None:
    few = WIDE.slice(0, 1500)
    at, values = few.schema.get_field_index(name), few[name].to_pylist()
    for row in (0, 1499):
        old = values[row]
        if isinstance(old, list):
            new: object = [*old[:-1], old[0]] if name == "top_labels" else [*old[:-1], old[-1] + 1]
        elif isinstance(old, bytes):
            new = old[:-1] + bytes([old[-1] ^ 1])
        elif isinstance(old, str):
            new = "gif" if name == "format" else old + "!"
        else:
            new = (old or 0) + 1
        changed = pa.array([*values[:row], new, *values[row + 1 :]], few.schema.field(name).type)
        assert digest_of([few.set_column(at, few.schema.field(name), changed)]) != digest_of([few])
    assert digest_of([few.slice(1)]) != digest_of([few])
