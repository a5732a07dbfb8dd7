"""A dataset as other tools read it: NumPy, FAISS, CSV, LanceDB, or the images with their labels as
WebDataset tars.

Everything is written shard by shard into a folder beside the one that is asked for, which appears
whole, by a rename, or not at all. Rows stand in the order of the dataset. Names of files and of tar
members are numbers: nothing of the data becomes a path.
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
from vitray.errors import JobError, ObjectChanged, ObjectMissing, ShardError, StorageError, one_line
from vitray.pipeline import list_source
from vitray.schema import IMAGE_SUFFIXES, Encoded, Shard, content_hash
from vitray.sources import read_shard
from vitray.storage import absolute, new_folder

log = logging.getLogger(__name__)
TABLE = "images"  # in a LanceDB database
TOLD = 3  # images named of those that are missing
EXTRAS = {"faiss": "search", "lance": "lance"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to write. column: of npy and faiss, where there are several. vectors: csv with them.
    partial: also of an incomplete dataset.
    """

    to: str
    column: str | None = None
    vectors: bool = False
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Export:
    """What was written. missing: rows without their image (webdataset), which could not be read
    again.
    """

    into: str
    to: str
    rows: int
    missing: int
    complete: bool
    examples: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.into}: {self.rows:,} rows as {self.to}"
            + ("" if self.complete else ", of a dataset that is NOT complete")
        ]
        if self.missing:
            lines.append(
                f"missing: {self.missing:,} images of the dataset could not be read again as they "
                f"were, such as {', '.join(self.examples)}"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Written:
    rows: int
    missing: int = 0
    examples: tuple[str, ...] = ()


def export(out: str, into: str, wanted: Wanted) -> Export:
    """Write the rows into a new local folder.

    Raises JobError when the dataset is not complete (unless partial), when `into` is there, and for
    a library that is not installed.
    """
    if wanted.to not in WRITERS:
        raise JobError(
            f"--to {wanted.to}: choose one of {', '.join(WRITERS)}, or a format of models (vitray "
            f"export --help)."
        )
    dataset = require_dataset(out) if wanted.partial else require_complete(out)
    target = absolute(into)
    require_outside(dataset, "--into", target)
    complete = is_complete(dataset)
    try:
        with new_folder(into, "--into") as folder:
            done = WRITERS[wanted.to](dataset, folder, wanted)
            metadata = {
                "source": dataset.out,
                "fingerprint": dataset.fingerprint,
                "to": wanted.to,
                "complete": complete,
            }
            (folder / "_EXPORT.json").write_text(
                json.dumps({**metadata, "rows": done.rows, "missing": done.missing}, indent=1)
            )
    except ImportError as error:
        raise JobError(
            f"--to {wanted.to} needs {error.name}: pip install 'vitray[{EXTRAS[wanted.to]}]'."
        ) from error
    return Export(target, wanted.to, done.rows, done.missing, complete, done.examples)


def _npy(dataset: Dataset, folder: Path, wanted: Wanted) -> Written:
    """vectors.npy [N, D] in the column's own type, and keys.parquet with what else is known of each
    row, in the same order.
    """
    vector, rows = choose_vector(dataset, wanted.column), sum(row_counts(dataset).values())
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
            f"{dataset.out} changed while it was read: {rows:,} rows became {seen:,}. Run the "
            f"same command again."
        )
    return Written(rows)


def _faiss(dataset: Dataset, folder: Path, wanted: Wanted) -> Written:
    """index.faiss over unit vectors, whose inner product is the cosine, and keys.parquet: the row
    of id n is its row n.

    FAISS holds the index in memory until it is written: N x D x 4 bytes.
    """
    import faiss

    vector = choose_vector(dataset, wanted.column)
    index = faiss.IndexFlatIP(vector.dimension)
    for values in _vectors_and_keys(dataset, folder, vector.column):
        unit = values.astype(np.float32)
        faiss.normalize_L2(unit)
        index.add(unit)
    faiss.write_index(index, str(folder / "index.faiss"))
    return Written(index.ntotal)


def _vectors_and_keys(dataset: Dataset, folder: Path, column: str) -> Iterator[np.ndarray]:
    """Blocks of vectors [n, D], whose rows' other columns are written into keys.parquet on the
    way.
    """
    names = _scalars(dataset)
    with pq.ParquetWriter(
        folder / "keys.parquet",
        pa.schema([dataset.schema.field(n) for n in names]),
        compression="zstd",
    ) as writer:
        for block in row_blocks(dataset, data_files(dataset.out), [*names, column]):
            writer.write_table(block.select(names))
            yield matrix_of(block[column])


def _csv(dataset: Dataset, folder: Path, wanted: Wanted) -> Written:
    """rows.csv: every scalar as it is, bytes in hex, lists as JSON; an empty field is null, an
    empty string is "".

    Vectors are JSON, too, which is what pgvector's COPY takes.
    """
    from pyarrow import csv

    names = dataset.schema.names if wanted.vectors else _scalars(dataset)
    vectors, rows = {v.column for v in dataset.vectors}, 0

    def texts(block: pa.Table) -> pa.Table:
        return pa.table(
            {
                name: (_vector_text if name in vectors else _text)(block[name].combine_chunks())
                for name in names
            }
        )

    with (
        open(folder / "rows.csv", "wb") as file,
        csv.CSVWriter(file, texts(dataset.schema.empty_table()).schema) as writer,
    ):
        for block in row_blocks(dataset, data_files(dataset.out), names):
            writer.write_table(texts(block))
            rows += len(block)
    return Written(rows)


def _text(column: pa.Array) -> pa.Array:
    kind = column.type
    if types.is_dictionary(kind):
        return column.cast(kind.value_type)
    if any(
        is_so(kind)
        for is_so in (
            types.is_nested,
            types.is_binary,
            types.is_large_binary,
            types.is_fixed_size_binary,
        )
    ):
        values = column.to_pylist()
        said = [v if v is None else v.hex() if isinstance(v, bytes) else _json(v) for v in values]
        return pa.array(said, pa.string())
    return column


def _vector_text(column: pa.Array) -> pa.Array:
    """[0.25,-1], each number with the fewest digits that give the same float32 again."""
    numbers, size = column.flatten().cast(pa.float32()).cast(pa.string()), column.type.list_size
    rows = pa.ListArray.from_arrays(pa.array(range(0, len(numbers) + 1, size), pa.int32()), numbers)
    return pc.binary_join_element_wise("[", pc.binary_join(rows, ","), "]", "")


def _json(value: object) -> str:
    return json.dumps(
        value,
        ensure_ascii=False,
        default=lambda other: other.hex() if isinstance(other, bytes) else str(other),
    )


def _lance(dataset: Dataset, folder: Path, wanted: Wanted) -> Written:
    """A LanceDB database with one table that holds every column."""
    import lancedb

    fields = [
        f.with_type(f.type.value_type) if types.is_dictionary(f.type) else f for f in dataset.schema
    ]
    blocks = row_blocks(dataset, data_files(dataset.out), dataset.schema.names)
    batches = (batch for block in blocks for batch in block.cast(pa.schema(fields)).to_batches())
    reader = pa.RecordBatchReader.from_batches(pa.schema(fields), batches)
    return Written(lancedb.connect(folder).create_table(TABLE, reader).count_rows())


def _webdataset(dataset: Dataset, folder: Path, wanted: Wanted) -> Written:
    """A tar for each data file: the bytes that were labelled, read again from the source, and a
    .json of the row without its vectors.
    """
    # of whatever version: where one file of a group changed, the others are as they were
    now = {base_of(shard.id): shard for shard in list_source(dataset.job, dataset.out).shards}
    written, lost, examples = 0, 0, list[str]()
    for number, url in enumerate(data_files(dataset.out)):
        shard = now.get(base_of(shard_of(url)))
        rows = {
            row["index"]: row
            for block in row_blocks(dataset, [url], _scalars(dataset))
            for row in block.to_pylist()
        }
        with tarfile.open(folder / f"{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, data in _images(dataset, shard, rows) if shard else ():
                name = f"{number:06d}-{row['index']:08d}"
                suffix = row["format"] if row["format"] in IMAGE_SUFFIXES else "bin"
                for member, body in (
                    (f"{name}.{suffix}", data),
                    (f"{name}.json", _json(row).encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
                written += 1
        lost += len(rows)
        examples += [f"{row['shard']} {row['index']}" for row in rows.values()][
            : TOLD - len(examples)
        ]
    return Written(written, lost, tuple(examples))


def _images(
    dataset: Dataset, shard: Shard, rows: dict[int, dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with the bytes that they were made from, taken out of `rows`; those that cannot be read
    again, or changed, stay there.
    """
    try:
        for item in read_shard(shard, dataset.job, rows.__contains__):
            if (
                isinstance(item, Encoded)
                and item.data
                and content_hash(item.data) == rows[item.index]["content_hash"]
            ):
                yield rows.pop(item.index), item.data
    except (ShardError, ObjectMissing, ObjectChanged) as error:
        log.warning("%s cannot be read again: %s", shard.id, one_line(error))


def _scalars(dataset: Dataset) -> list[str]:
    """Every column but the vectors."""
    return [
        name for name in dataset.schema.names if name not in {v.column for v in dataset.vectors}
    ]


Writer = Callable[[Dataset, Path, Wanted], Written]
WRITERS: dict[str, Writer] = {
    "lance": _lance,
    "faiss": _faiss,
    "npy": _npy,
    "webdataset": _webdataset,
    "csv": _csv,
}
