"""A digest of rows that depends on their values alone, not on how a file stores them."""

from __future__ import annotations

import hashlib

import pyarrow as pa

from vitray.arrow_types import rebuilt_type, without_list_views

DIGEST_ROWS = 1024


class RowsDigest:
    """SHA-256 of rows: the same for any split into tables or row groups, and read from Parquet."""

    def __init__(self) -> None:
        self.rows = 0
        self._digest = hashlib.sha256()
        self._pending: pa.Table | None = None  # fewer than DIGEST_ROWS rows

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        table = _with_unique_layout(table.replace_schema_metadata(None))
        pending = table if self._pending is None else pa.concat_tables([self._pending, table])
        while pending.num_rows >= DIGEST_ROWS:
            self._digest.update(_canonical(pending.slice(0, DIGEST_ROWS)))
            pending = pending.slice(DIGEST_ROWS)
        self._pending = pending

    def hexdigest(self) -> str:
        """The digest of all added rows. Add none afterwards."""
        if self._pending is not None and self._pending.num_rows:
            self._digest.update(_canonical(self._pending))
            self._pending = None
        return self._digest.hexdigest()


def _with_unique_layout(table: pa.Table) -> pa.Table:
    """The same values in types without dictionaries and views, which have several layouts."""
    for at, name in enumerate(table.column_names):
        column = without_list_views(table.column(at))
        if (kind := _unique_layout_type(column.type)) != table.schema.field(at).type:
            table = table.set_column(at, name, column.cast(kind))
    return table


def _unique_layout_type(kind: pa.DataType) -> pa.DataType:
    large = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}

    def leaf(kind: pa.DataType) -> pa.DataType:
        if isinstance(kind, pa.BaseExtensionType):
            return _unique_layout_type(kind.storage_type)
        if pa.types.is_dictionary(kind):
            return _unique_layout_type(kind.value_type)
        return large.get(kind, kind)

    return rebuilt_type(kind, leaf)


def _canonical(table: pa.Table) -> bytes:
    """The rows as bytes that depend on their values alone."""
    # take() makes new arrays: no offsets, no leftover bits after the end
    batches = table.take(pa.array(range(table.num_rows))).combine_chunks().to_batches()
    # without the schema: Parquet renames the children of lists
    names = [name.encode() for name in table.column_names]
    return b"\0".join(names + [bytes(batch.serialize()) for batch in batches])
