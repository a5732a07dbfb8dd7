"""Reading a dataset back: the rows that the manifest admits, in order, at once or in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset.files import read_parquet, read_table
from vitray.dataset.identity import Dataset, find_dataset, open_dataset
from vitray.dataset.layout import base_of, data_url, version_of
from vitray.dataset.ledger import (
    committed_files,
    is_marked_complete,
    read_manifest,
    unchanged_counts,
)
from vitray.dataset.pointer import read_pointer
from vitray.errors import JobError, SourceError
from vitray.schema import ERROR_SCHEMA, VectorColumn
from vitray.storage import absolute, expand_braces, reads, store_for

# examples of what commands write that make a folder
WRITTEN = ("data/x.parquet", "x.parquet", "x.tar")
BLOCK_ROWS = 4096  # 12 MB of a 768-float vector


def require_dataset(out: str, follow: bool = True) -> Dataset:
    """The dataset in a directory, or the current one of a pointer.

    follow: False refuses a pointer, for commands that change rows. Raises JobError for any other
    directory, and for a pointer whose dataset is gone.
    """
    dataset = find_dataset(out) if follow else open_dataset(out)
    if dataset is None:
        dataset = _pointed_dataset(absolute(out))
    if dataset is None:
        raise JobError(
            f"{absolute(out)} holds no vitray dataset. Check the path, or run a job into it first."
        )
    return dataset


def _pointed_dataset(url: str) -> Dataset | None:
    """The dataset that a pointer names now; None where there is no pointer."""
    stored = read_pointer(url)
    if stored is None:
        return None
    version = stored.pointer.current_version
    dataset = find_dataset(version.dataset)
    if dataset is None:
        raise JobError(
            f"{url} points to {version.dataset} (version {version.number}), which is gone. "
            f"Restore it, promote another dataset, or go back: vitray rollback {url}"
        )
    if dataset.fingerprint != version.fingerprint:
        raise JobError(
            f"{url} points to {version.dataset} (version {version.number}), which holds another "
            f"dataset now (fingerprint {dataset.fingerprint[:8]}…, promoted: "
            f"{version.fingerprint[:8]}…). Promote it, or go back: vitray rollback {url}"
        )
    return dataset


def require_complete(out: str) -> Dataset:
    """The complete dataset in a directory. Raises JobError for a missing or partial dataset."""
    dataset = require_dataset(out)
    if not is_complete(dataset):
        raise JobError(
            f"{dataset.out} is not complete: run its job first (vitray status {dataset.out})."
        )
    return dataset


def is_complete(dataset: Dataset) -> bool:
    """Whether nothing was pending after the last run."""
    return is_marked_complete(dataset.out)


def require_outside(dataset: Dataset, option: str, url: str) -> None:
    """Raises JobError for an output inside the dataset, or inside its source.

    The next run would read such an output as input.
    """
    patterns = {dataset.out: "the dataset"}
    for source in dataset.job.source:
        for part in expand_braces(absolute(source)):
            patterns.setdefault(part, f"its source {source}")
    for pattern, what in patterns.items():
        if any(reads(pattern, url, name) for name in WRITTEN):
            raise JobError(f"{option} {url} lies inside {what}: choose another path.")


def data_files(out: str) -> list[str]:
    """The URLs of the data files that count, in the order of shard ids.

    One version of each input counts: the manifest's if it has one.
    """
    shards = sorted(committed_files(absolute(out)))
    manifest = read_manifest(absolute(out))
    versions = {base_of(shard): version_of(shard) for shard in shards}
    if manifest is not None:
        existing = set(shards)
        in_manifest = [shard for shard in manifest["shard"].to_pylist() if shard in existing]
        versions |= {base_of(shard): version_of(shard) for shard in in_manifest}
    admitted = [shard for shard in shards if versions[base_of(shard)] == version_of(shard)]
    return [data_url(out, shard) for shard in admitted]


def read(out: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Every good row of a dataset as one table, ordered by (shard, index).

    out: its directory, or a pointer to it. columns: the ones to read, e.g. ["key", "label",
    "embedding"]; all when None. Raises SourceError when no shard is committed.
    """
    urls = data_files(out)
    if not urls and (pointed := _pointed_dataset(absolute(out))) is not None:
        urls = data_files(pointed.out)
    if not urls:
        raise SourceError(
            f"{out} holds no committed shard. Run a job into it first, or check the path."
        )

    def one(url: str) -> pa.Table:
        with store_for(url).open(url) as stream:
            return read_table(stream, columns)

    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(one, urls))
    return pa.concat_tables(tables).replace_schema_metadata(None).unify_dictionaries()


def read_errors(dataset: Dataset) -> pa.Table:
    """The error rows of a complete dataset, in the order of shard ids: schema.ERROR_SCHEMA."""
    manifest = read_manifest(dataset.out)
    rows = [] if manifest is None else manifest.select(["shard", "errors"]).to_pylist()
    tables = [read_parquet(dataset.errors_url(row["shard"])) for row in rows if row["errors"]]
    return pa.concat_tables([ERROR_SCHEMA.empty_table(), *tables])


def row_blocks(dataset: Dataset, urls: Iterable[str], columns: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of the rows of data files, in their order, at most BLOCK_ROWS at a time."""
    schema = pa.schema([dataset.schema.field(name) for name in columns])
    for url in urls:
        with store_for(url).open(url) as stream:
            file = pq.ParquetFile(stream, pre_buffer=False)
            for batch in file.iter_batches(BLOCK_ROWS, columns=list(columns), use_threads=False):
                yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)


def row_counts(dataset: Dataset) -> dict[str, int]:
    """The rows of each data file that counts, by URL, in the order of data_files."""
    # an interrupted removal leaves files that differ from the manifest
    counts = unchanged_counts(dataset) if is_complete(dataset) else {}
    paths = {url: url.removeprefix(f"{dataset.out}/") for url in data_files(dataset.out)}
    return {url: counts[path] if path in counts else rows_in(url) for url, path in paths.items()}


def rows_in(url: str) -> int:
    """How many rows a Parquet file holds, by its footer."""
    with store_for(url).open(url) as stream:
        return int(pq.ParquetFile(stream, pre_buffer=False).metadata.num_rows)


def choose_vector(dataset: Dataset, name: str | None) -> VectorColumn:
    """The vector column of that name, or the only one. Raises JobError for any other case."""
    columns = {vector.column: vector for vector in dataset.vectors}
    chosen = name or (next(iter(columns)) if len(columns) == 1 else "")
    if chosen not in columns:
        raise JobError(
            f"{dataset.out} has the vector columns {', '.join(columns) or '(none)'}: "
            "choose one by `column` (--column)."
        )
    return columns[chosen]


def matrix_of(column: pa.ChunkedArray) -> np.ndarray:
    """A vector column as an array [N, D] of its own type."""
    flat = column.combine_chunks()
    values: np.ndarray = (
        flat.flatten().to_numpy(zero_copy_only=False).reshape(len(flat), flat.type.list_size)
    )
    return values
