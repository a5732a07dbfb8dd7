"""A dataset in formats of other tools: NumPy, FAISS, CSV, LanceDB, or WebDataset tars with images.

Everything is written shard by shard into a temporary folder, whose rename makes the export appear
whole or not at all. Rows are in the order of the dataset. Names of files and of tar members are
numbers: nothing of the data becomes a path.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import types

from vitray.dataset import (
    Dataset,
    base_of,
    choose_vector,
    data_files,
    is_complete,
    matrix_of,
    require_complete,
    require_dataset,
    require_outside,
    row_blocks,
    row_counts,
    shard_of,
)
from vitray.errors import (
    JobError,
    ObjectChanged,
    ObjectMissing,
    ShardError,
    StorageError,
    count,
    one_line,
)
from vitray.pipeline import list_source
from vitray.schema import IMAGE_SUFFIXES, Encoded, Shard, content_hash
from vitray.sources import read_shard
from vitray.storage import absolute, new_folder

log = logging.getLogger(__name__)
TABLE = "images"  # in a LanceDB database
EXAMPLES = 3  # missing images that are named
EXTRAS = {"faiss": "search", "lance": "lance"}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to write.

    to: a name in WRITERS. column: the vector column for npy and faiss, where there are several.
    vectors: whether csv includes them. partial: accept an incomplete dataset.
    """

    to: str
    column: str | None = None
    vectors: bool = False
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Export:
    """The result of an export. missing: rows whose image could not be read again (webdataset)."""

    into: str
    to: str
    rows: int
    missing: int
    complete: bool
    examples: tuple[str, ...]

    def __str__(self) -> str:
        note = "" if self.complete else ", of a dataset that is NOT complete"
        lines = [f"{self.into}: {count(self.rows, 'row')} as {self.to}{note}"]
        if self.missing:
            lines.append(
                f"missing: {count(self.missing, 'image')} of the dataset could not be read again "
                f"unchanged, such as {', '.join(self.examples)}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a writer, as in Export."""

    rows: int
    missing: int = 0
    examples: tuple[str, ...] = ()


def export(out: str, into: str, options: ExportOptions) -> Export:
    """Write the rows into a new local folder.

    Raises JobError for an incomplete dataset (unless partial), for an existing `into`, and for a
    library that is not installed.
    """
    if options.to not in WRITERS:
        raise JobError(
            f"--to {options.to}: choose one of {', '.join(WRITERS)}. "
            "To export a model, use vitray export-model."
        )
    dataset = require_dataset(out) if options.partial else require_complete(out)
    target = absolute(into)
    require_outside(dataset, "--into", target)
    complete = is_complete(dataset)
    try:
        with new_folder(into, "--into") as folder:
            written = WRITERS[options.to](dataset, folder, options)
            document = {
                "source": dataset.out,
                "fingerprint": dataset.fingerprint,
                "to": options.to,
                "complete": complete,
                "rows": written.rows,
                "missing": written.missing,
            }
            (folder / "_EXPORT.json").write_text(json.dumps(document, indent=1))
    except ImportError as error:
        raise JobError(
            f"--to {options.to} needs {error.name}: pip install 'vitray[{EXTRAS[options.to]}]'."
        ) from error
    return Export(target, options.to, written.rows, written.missing, complete, written.examples)


def _npy(dataset: Dataset, folder: Path, options: ExportOptions) -> Written:
    """vectors.npy [N, D] in the column's own type, and keys.parquet with the rows' other columns.

    Both have the same order.
    """
    vector = choose_vector(dataset, options.column)
    rows = sum(row_counts(dataset).values())
    header = {
        "descr": np.dtype(vector.dtype).str,
        "fortran_order": False,
        "shape": (rows, vector.dimension),
    }
    seen = 0
    with open(folder / "vectors.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for values in _vectors_and_keys(dataset, folder, vector.column):
            file.write(values.tobytes())
            seen += len(values)
    if seen != rows:
        raise StorageError(
            f"{dataset.out} changed while it was read: {count(rows, 'row')} became {seen:,}. "
            "Run the same command again."
        )
    return Written(rows)


def _faiss(dataset: Dataset, folder: Path, options: ExportOptions) -> Written:
    """index.faiss over unit vectors, and keys.parquet: its row n belongs to id n.

    The inner product of unit vectors is the cosine. FAISS holds the index in memory until it is
    written: N x D x 4 bytes.
    """
    import faiss

    vector = choose_vector(dataset, options.column)
    index = faiss.IndexFlatIP(vector.dimension)
    for values in _vectors_and_keys(dataset, folder, vector.column):
        unit = values.astype(np.float32)
        faiss.normalize_L2(unit)
        index.add(unit)
    faiss.write_index(index, str(folder / "index.faiss"))
    return Written(index.ntotal)


def _vectors_and_keys(dataset: Dataset, folder: Path, column: str) -> Iterator[np.ndarray]:
    """Blocks of vectors [n, D]; writes the rows' other columns into keys.parquet meanwhile."""
    names = _scalars(dataset)
    schema = pa.schema([dataset.schema.field(name) for name in names])
    with pq.ParquetWriter(folder / "keys.parquet", schema, compression="zstd") as writer:
        for block in row_blocks(dataset, data_files(dataset.out), [*names, column]):
            writer.write_table(block.select(names))
            yield matrix_of(block[column])


def _csv(dataset: Dataset, folder: Path, options: ExportOptions) -> Written:
    """rows.csv: scalars as they are, bytes in hex, lists and vectors as JSON.

    An empty field is null, an empty string is "". pgvector's COPY takes vectors as JSON.
    """
    from pyarrow import csv

    names = dataset.schema.names if options.vectors else _scalars(dataset)
    vectors = {v.column for v in dataset.vectors}
    rows = 0

    def texts(block: pa.Table) -> pa.Table:
        columns = {name: block[name].combine_chunks() for name in names}
        return pa.table(
            {
                name: _vector_text(column) if name in vectors else _text(column)
                for name, column in columns.items()
            }
        )

    schema = texts(dataset.schema.empty_table()).schema
    with open(folder / "rows.csv", "wb") as file, csv.CSVWriter(file, schema) as writer:
        for block in row_blocks(dataset, data_files(dataset.out), names):
            writer.write_table(texts(block))
            rows += len(block)
    return Written(rows)


def _text(column: pa.Array) -> pa.Array:
    """A column in a type that a CSV file can have."""
    kind = column.type
    if types.is_dictionary(kind):
        return column.cast(kind.value_type)
    if any(is_kind(kind) for is_kind in _AS_TEXT):
        return pa.array([_value_text(value) for value in column.to_pylist()], pa.string())
    return column


_AS_TEXT = (
    types.is_nested,
    types.is_binary,
    types.is_large_binary,
    types.is_fixed_size_binary,
)


def _value_text(value: object) -> str | None:
    """Null as null, bytes in hex, anything else as JSON."""
    if value is None:
        return None
    return value.hex() if isinstance(value, bytes) else _json(value)


def _vector_text(column: pa.Array) -> pa.Array:
    """Vectors as `[0.25,-1]`, each number with the fewest digits that restore its float32."""
    numbers = column.flatten().cast(pa.float32()).cast(pa.string())
    size = column.type.list_size
    rows = pa.ListArray.from_arrays(pa.array(range(0, len(numbers) + 1, size), pa.int32()), numbers)
    return pc.binary_join_element_wise("[", pc.binary_join(rows, ","), "]", "")


def _json(value: object) -> str:
    return json.dumps(
        value,
        ensure_ascii=False,
        default=lambda other: other.hex() if isinstance(other, bytes) else str(other),
    )


def _lance(dataset: Dataset, folder: Path, options: ExportOptions) -> Written:
    """A LanceDB database with one table of all columns."""
    import lancedb

    fields = [
        f.with_type(f.type.value_type) if types.is_dictionary(f.type) else f for f in dataset.schema
    ]
    blocks = row_blocks(dataset, data_files(dataset.out), dataset.schema.names)
    batches = (batch for block in blocks for batch in block.cast(pa.schema(fields)).to_batches())
    reader = pa.RecordBatchReader.from_batches(pa.schema(fields), batches)
    return Written(lancedb.connect(folder).create_table(TABLE, reader).count_rows())


def _webdataset(dataset: Dataset, folder: Path, options: ExportOptions) -> Written:
    """One tar per data file: the labelled bytes of each image, and a .json with its row.

    The bytes are read again from the source. The row has no vectors.
    """
    # by any version: where one file of a group changed, the others are the same
    listed = {base_of(shard.id): shard for shard in list_source(dataset.job, dataset.out).shards}
    rows_written = 0
    missing = 0
    examples = list[str]()
    for number, url in enumerate(data_files(dataset.out)):
        shard = listed.get(base_of(shard_of(url)))
        rows = dict[int, dict[str, Any]]()
        for block in row_blocks(dataset, [url], _scalars(dataset)):
            rows |= {row["index"]: row for row in block.to_pylist()}
        with tarfile.open(folder / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, data in _images(dataset, shard, rows) if shard else ():
                _add_sample(tar, f"{number:06d}-{row['index']:08d}", row, data)
                rows_written += 1
        missing += len(rows)
        names = [f"{row['shard']} {row['index']}" for row in rows.values()]
        examples += names[: EXAMPLES - len(examples)]
    return Written(rows_written, missing, tuple(examples))


def _add_sample(tar: tarfile.TarFile, name: str, row: dict[str, Any], data: bytes) -> None:
    """Add an image and its row to a tar."""
    suffix = row["format"] if row["format"] in IMAGE_SUFFIXES else "bin"
    members = {f"{name}.{suffix}": data, f"{name}.json": _json(row).encode()}
    for member, body in members.items():
        info = tarfile.TarInfo(member)
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))


def _images(
    dataset: Dataset, shard: Shard, rows: dict[int, dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each row with the bytes that it was made from. The row is removed from `rows`.

    Rows whose image cannot be read again, or has changed, stay in `rows`.
    """
    try:
        for item in read_shard(shard, dataset.job, rows.__contains__):
            if not isinstance(item, Encoded) or not item.data:
                continue
            if content_hash(item.data) == rows[item.index]["content_hash"]:
                yield rows.pop(item.index), item.data
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        log.warning("%s cannot be read again: %s", shard.id, one_line(error))


def _scalars(dataset: Dataset) -> list[str]:
    """The names of all columns except vectors."""
    vectors = {vector.column for vector in dataset.vectors}
    return [name for name in dataset.schema.names if name not in vectors]


Writer = Callable[[Dataset, Path, ExportOptions], Written]
WRITERS: dict[str, Writer] = {
    "lance": _lance,
    "faiss": _faiss,
    "npy": _npy,
    "webdataset": _webdataset,
    "csv": _csv,
}
