"""Take the rows of removed keys out of data files and staging.

A data file is rewritten on condition that it is the version that was read. So a reader sees the old
file or the new one, and of two writers one starts over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.crash import crash_point
from vitray.dataset.data_file import object_metadata, parquet_of, repair_errors
from vitray.dataset.footer import (
    Footer,
    ShardInput,
    footer_metadata,
    parse_footer,
    read_footer,
)
from vitray.dataset.identity import Dataset
from vitray.dataset.removed_keys import Fragment, RemovedKeys, hash_of
from vitray.dataset.row_digest import RowsDigest
from vitray.errors import ObjectChanged, ObjectMissing, StorageError
from vitray.schema import ERROR_SCHEMA, End
from vitray.storage import store_for

ATTEMPTS = 10  # at a data file that others rewrite, too
BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Drop:
    """What a data file held of removed keys.

    footer: of the file as it is now; None where there is no such file. hashes: of the keys.
    """

    footer: Footer | None
    rows: int = 0
    errors: int = 0
    hashes: frozenset[bytes] = field(default=frozenset(), repr=False)


def find_rows(dataset: Dataset, shard: str, removed: RemovedKeys) -> Drop:
    """The rows and errors of removed keys in a data file, which stays as it is."""
    try:
        footer = read_footer(dataset.data_url(shard))
        with store_for(dataset.out).open(dataset.data_url(shard)) as stream:
            return _found(footer, stream, removed)
    except ObjectMissing:
        return Drop(None)


def _found(footer: Footer, stream: BinaryIO, removed: RemovedKeys) -> Drop:
    hashes = set[bytes]()
    file = pq.ParquetFile(stream, pre_buffer=False)
    rows = 0
    for batch in file.iter_batches(BATCH_ROWS, columns=["key"], use_threads=False):
        keys = batch.column(0)
        positions = removed.blocked(keys)
        rows += len(positions)
        hashes |= {hash_of(keys[n].as_py()) for n in positions}
    error_keys = footer.error_rows["key"]
    positions = removed.blocked(error_keys)
    hashes |= {hash_of(error_keys[n].as_py()) for n in positions}
    return Drop(footer, rows, len(positions), frozenset(hashes))


def drop_rows(dataset: Dataset, shard: str, removed: RemovedKeys) -> Drop:
    """Rewrite a data file without the rows and errors of removed keys, if it holds any.

    Its file of error rows becomes a copy of what is left, also where an earlier writer failed to
    do so. Raises StorageError where others keep rewriting the file.
    """
    url = dataset.data_url(shard)
    for _ in range(ATTEMPTS):
        try:
            version = store_for(url).stat(url).version
            footer = read_footer(url)
            if footer.fingerprint != dataset.fingerprint:
                return Drop(footer)
            with store_for(url).open(url, version) as stream:
                drop = _found(footer, stream, removed)
                if not drop.hashes:
                    return replace(drop, footer=repair_errors(dataset, footer))
                stream.seek(0)
                data, metadata = _rewritten(dataset, footer, stream, removed)
        except ObjectMissing:
            return Drop(None)
        except ObjectChanged:
            continue
        new_footer = parse_footer(metadata)
        if drop.errors:  # absent files are made again; this one would keep a removed key
            store_for(url).delete([dataset.errors_url(shard)])
        crash_point("removal-written", shard)
        if _replace(url, version, data, new_footer, metadata):
            crash_point("removal-replaced", shard)
            with contextlib.suppress(ObjectMissing):  # another command deleted the data file
                new_footer = repair_errors(dataset, new_footer)
            crash_point("removal-rewritten", shard)
            return Drop(new_footer, drop.rows, drop.errors, drop.hashes)
    raise StorageError(f"{url}: others keep rewriting it. Run the same command again.")


def _replace(url: str, version: str, data: bytes, footer: Footer, metadata: dict[str, str]) -> bool:
    """Whether the data file is this one now."""
    if store_for(url).replace_version(url, version, data, object_metadata(data, metadata)):
        return True
    try:  # the answer to an earlier attempt may be lost
        return read_footer(url).write_id == footer.write_id
    except ObjectMissing:
        return False


def _rewritten(
    dataset: Dataset, footer: Footer, stream: BinaryIO, removed: RemovedKeys
) -> tuple[bytes, dict[str, str]]:
    """A data file without removed keys, and the metadata of its footer."""
    errors = removed.filter(
        Fragment(pa.Table.from_batches([], dataset.schema), footer.error_rows, {})
    )
    left_out = dict(footer.left_out)
    digest = RowsDigest()

    def add(counts: dict[str, int]) -> None:
        for name, number in counts.items():
            left_out[name] = left_out.get(name, 0) + number

    def rows() -> Iterator[pa.Table]:
        file = pq.ParquetFile(stream, pre_buffer=False)
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            table = pa.Table.from_batches([batch]).select(dataset.schema.names)
            part = removed.filter(
                Fragment(table.cast(dataset.schema), ERROR_SCHEMA.empty_table(), {})
            )
            add(part.left_out)
            digest.add(part.rows)
            yield part.rows

    def metadata() -> dict[str, str]:
        add(errors.left_out)
        source = ShardInput(footer.shard, footer.url, footer.source_version)
        end = End(footer.total, footer.truncated_at, "", left_out, footer.image_members)
        error_rows = errors.errors.combine_chunks()
        return footer_metadata(dataset, source, end, digest, error_rows, removals=removed.lists)

    return parquet_of(dataset, rows(), metadata)
