"""Arrow types: rebuild nested types, replace list views, cast without a change of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list of any kind: of fixed or variable size, or a view."""
    return pa.types.is_fixed_size_list(kind) or any(is_kind(kind) for is_kind, _ in _LISTS)


def rebuilt_type(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """A type with its leaves replaced, at any depth."""

    def inside(field: pa.Field) -> pa.Field:
        return field.with_type(rebuilt_type(field.type, leaf))

    if pa.types.is_map(kind):
        return pa.map_(rebuilt_type(kind.key_type, leaf), inside(kind.item_field), kind.keys_sorted)
    if pa.types.is_struct(kind):
        return pa.struct([inside(field) for field in kind])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(inside(kind.value_field), kind.list_size)
    for is_kind, list_of in _LISTS:
        if is_kind(kind):
            return list_of(inside(kind.value_field))
    return leaf(kind)


def holds_list_views(kind: pa.DataType) -> bool:
    """Whether a type is a list view, or has one at any depth."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_list_views(kind.storage_type)
    is_view = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    return is_view or any(holds_list_views(kind.field(n).type) for n in range(kind.num_fields))


def without_list_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The same values with lists in place of list views.

    pyarrow 26.0 casts a list view to a list with one offset too few, which crashes later.
    """
    if not holds_list_views(column.type):
        return column
    return pa.chunked_array(
        [_lists_of(chunk) for chunk in column.chunks or [pa.nulls(0, column.type)]]
    )


def _lists_of(array: pa.Array) -> pa.Array:
    """The same values with lists in place of list views, at any depth."""
    kind = array.type
    if not holds_list_views(kind):
        return array
    if isinstance(kind, pa.BaseExtensionType):
        return _lists_of(array.storage)
    is_null = array.is_null()
    if pa.types.is_struct(kind):
        children = [_lists_of(child) for child in array.flatten()]
        return pa.StructArray.from_arrays(
            children, names=[field.name for field in kind], mask=is_null
        )
    if pa.types.is_fixed_size_list(kind):
        size = kind.list_size  # `values` is of the whole array, which this may be a slice of
        values = _lists_of(array.values.slice(array.offset * size, len(array) * size))
        return pa.FixedSizeListArray.from_arrays(values, size, mask=is_null)
    if pa.types.is_map(kind):
        offsets = pc.add(array.offsets, 0)  # a copy: a mask needs offsets that are not a slice
        return pa.MapArray.from_arrays(
            offsets, _lists_of(array.keys), _lists_of(array.items), mask=is_null
        )
    return _list_of_spans(array)


def _list_of_spans(array: pa.Array) -> pa.Array:
    """A list or list view as a list, whose values are contiguous."""
    kind = array.type
    is_null = array.is_null()
    is_large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    sizes = pc.if_else(is_null, 0, pc.list_value_length(array).cast(pa.int64()))
    ends = pc.cumulative_sum(sizes) if len(sizes) else sizes
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends]).cast(
        pa.int64() if is_large else pa.int32()
    )
    starts = array.offsets.slice(0, len(array)).cast(pa.int64())
    values = _lists_of(_spans(array.values, starts.to_numpy(), sizes.to_numpy()))
    return (pa.LargeListArray if is_large else pa.ListArray).from_arrays(
        offsets, values, mask=is_null
    )


def _spans(values: pa.Array, starts: np.ndarray, sizes: np.ndarray) -> pa.Array:
    """The values of all spans, one after the other; a single slice where they are contiguous."""
    # what Parquet returns is contiguous
    if len(starts) and (starts == starts[0] + np.cumsum(sizes) - sizes)[sizes > 0].all():
        return values.slice(int(starts[0]), int(sizes.sum()))
    spans = [values.slice(int(start), int(size)) for start, size in zip(starts, sizes) if size]
    return pa.concat_arrays(spans) if spans else values.slice(0, 0)


def with_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column with another type and equal values. Raises pa.ArrowException if one would change."""
    if column.type == kind:
        return column
    if holds_list_views(column.type) and not holds_list_views(kind):
        column = without_list_views(column)
    if pa.types.is_dictionary(column.type) or pa.types.is_dictionary(kind):
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        column = column.cast(values)
        return column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column
    return column.cast(kind)


def take_rows(column: pa.ChunkedArray, rows: Sequence[int]) -> pa.ChunkedArray:
    """These rows of a column, in ascending order, for every Arrow type.

    pyarrow's own `take` lacks the view types (26.0).
    """
    slices = list[pa.ChunkedArray]()
    first = 0
    for stop in range(1, len(rows) + 1):
        if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
            slices.append(column.slice(rows[first], stop - first))
            first = stop
    return pa.chunked_array([chunk for part in slices for chunk in part.chunks], column.type)
