"""Rows as one Parquet file, written on the scratch disk; and its file of error rows."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.files import parquet_bytes, read_table
from vitray.dataset.footer import Footer, read_footer
from vitray.dataset.identity import Dataset
from vitray.errors import ObjectMissing, StorageError
from vitray.storage import exists, read, store_for

# 50 MB of a 768-float vector: small enough for a laptop, large enough for a scan
ROW_GROUP_ROWS = 16_384
ATTEMPTS = 10  # at the error rows of a data file that others rewrite
# object metadata are HTTP headers: visible ASCII, 2 kB in all
_IN_HEADER = re.compile(r"[!-~]{1,64}")


def parquet_of(
    dataset: Dataset, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> tuple[bytes, dict[str, str]]:
    """Tables of rows as one Parquet file, and the metadata of its footer.

    metadata: called when all rows are written. The file is written on the scratch disk without a
    name there, so that a killed process leaves nothing.
    """
    try:
        descriptor, path = tempfile.mkstemp(prefix="vitray-")
        with open(descriptor, "rb") as scratch:
            values = _write_parquet(dataset, Path(path), tables, metadata)
            return scratch.read(), values
    except OSError as error:
        raise StorageError(
            f"scratch disk {tempfile.gettempdir()}: {error}. Free space there or set TMPDIR."
        ) from error


def object_metadata(data: bytes, metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of the object: those of the footer that fit into an HTTP header, and SHA-256."""
    headers = {
        name.replace("vitray.", "vitray-").replace("_", "-"): value
        for name, value in metadata.items()
        if _IN_HEADER.fullmatch(value)
    }
    return headers | {"vitray-sha256": hashlib.sha256(data).hexdigest()}


def write_errors(dataset: Dataset, footer: Footer) -> None:
    """Write the shard's file of error rows from the footer, when it has errors.

    A removal may replace the data file meanwhile. Look for removed keys afterwards.
    """
    if footer.errors:
        store_for(dataset.out).replace(
            dataset.errors_url(footer.shard), parquet_bytes(footer.error_rows)
        )


def repair_errors(dataset: Dataset, footer: Footer) -> Footer:
    """Make the shard's file of error rows a copy of those in its data file. Returns its footer.

    footer: as it was read last. It is read again after each write: of two writers, the one that
    writes last has seen the footer that counts. Raises ObjectMissing where the data file is gone,
    StorageError where others keep rewriting it.
    """
    for _ in range(ATTEMPTS):
        if _is_copied(dataset, footer):
            return footer
        if footer.errors:
            write_errors(dataset, footer)
        else:
            store_for(dataset.out).delete([dataset.errors_url(footer.shard)])
        current = read_footer(dataset.data_url(footer.shard))
        if current.write_id == footer.write_id:
            return footer
        footer = current
    raise StorageError(
        f"{dataset.data_url(footer.shard)}: others keep rewriting it. Run the same command again."
    )


def _is_copied(dataset: Dataset, footer: Footer) -> bool:
    """Whether the shard's file of error rows is what its data file says. Without errors: none."""
    url = dataset.errors_url(footer.shard)
    if not footer.errors:
        return not exists(url)
    try:
        return bool(read_table(pa.BufferReader(read(url))).equals(footer.error_rows))
    except (ObjectMissing, pa.ArrowException, OSError, ValueError):  # absent or damaged
        return False


def _write_parquet(
    dataset: Dataset, path: Path, tables: Iterable[pa.Table], metadata: Callable[[], dict[str, str]]
) -> dict[str, str]:
    schema = dataset.schema
    vectors = {v.column for v in dataset.vectors}
    buffered = list[pa.Table]()
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[
            f.name for f in schema if f.name not in vectors and not pa.types.is_nested(f.type)
        ],
        use_byte_stream_split=[f"{name}.list.element" for name in vectors],
    ) as writer:
        path.unlink()
        for table in tables:
            buffered.append(table.select(schema.names).cast(schema))
            if sum(t.num_rows for t in buffered) >= ROW_GROUP_ROWS:
                writer.write_table(pa.concat_tables(buffered), row_group_size=ROW_GROUP_ROWS)
                buffered.clear()
        if buffered:
            writer.write_table(pa.concat_tables(buffered), row_group_size=ROW_GROUP_ROWS)
        values = metadata()
        writer.add_key_value_metadata(values)
    return values
