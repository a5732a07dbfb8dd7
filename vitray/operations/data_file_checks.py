"""Whether a data file is what was written: its footer, rows, values and error rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitray.dataset import (
    Dataset,
    Footer,
    RemovedKeys,
    RowsDigest,
    drop_removed_fragments,
    error_files,
    read_footer,
    read_table,
)
from vitray.errors import CommitError, ObjectMissing, count, one_line
from vitray.schema import ScoreFunction, VectorColumn
from vitray.storage import read

# by type: deviation of a unit vector's length after rounding, for dimensions up to 4096
NORM_TOLERANCE = {"float32": 1e-4, "float16": 5e-3}
HIGHEST_SCORE = 1.0001  # of a probability, with rounding
REMOVE_AGAIN = "; run vitray remove again with the same keys"
# what damaged bytes raise, depending on where they are
UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, SystemError)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What is wrong with a data file.

    footer: None if the file cannot be read. removed: rows and error rows with a removed key.
    """

    footer: Footer | None
    problems: list[str] = field(default_factory=list)
    removed: int = 0


@dataclass(frozen=True, slots=True)
class Leftovers:
    """Removed keys outside data files. removed: error rows and staged fragments with one."""

    problems: list[str] = field(default_factory=list)
    removed: int = 0


def check_file(
    dataset: Dataset,
    shard: str,
    manifest_row: dict[str, object] | None,
    removed: RemovedKeys = RemovedKeys(),  # noqa: B008 (immutable)
) -> FileCheck:
    """Check the data file of a shard, also against its row of the manifest if there is one.

    removed: keys that must have no row.
    """
    url = dataset.data_url(shard)
    try:
        footer = read_footer(url)
        body = read(url)
    except (CommitError, ObjectMissing, *UNREADABLE) as error:
        return FileCheck(None, [one_line(error)])
    problems = list(_check_footer(dataset, shard, footer))
    rows = errors = 0
    if manifest_row is not None:
        problems += _check_manifest_row(manifest_row, footer, body)
    try:
        file = pq.ParquetFile(pa.BufferReader(body), pre_buffer=False)
        problems += _check_rows(dataset, shard, footer, file)
        rows, errors = _count_removed(footer, file, removed)
    except UNREADABLE as error:
        problems.append(f"cannot be read: {one_line(error)}")
    if rows:
        problems.append(f"{count(rows, 'row')} with a removed key{REMOVE_AGAIN}")
    if errors:
        problems.append(f"{count(errors, 'error row')} with a removed key{REMOVE_AGAIN}")
    if footer.errors:
        problems += _check_errors(dataset, shard, footer)
    return FileCheck(footer, problems, rows + errors)


def _check_footer(dataset: Dataset, shard: str, footer: Footer) -> Iterator[str]:
    if footer.fingerprint != dataset.fingerprint:
        yield f"fingerprint {footer.fingerprint[:8]}… is not the dataset's"
    if footer.shard != shard:
        yield f"its footer names shard {footer.shard}"


def _check_manifest_row(row: dict[str, object], footer: Footer, body: bytes) -> Iterator[str]:
    values = {
        "sha256": hashlib.sha256(body).hexdigest(),
        "rows": footer.rows,
        "errors": footer.errors,
    }
    for name, value in values.items():
        if row[name] != value:
            yield f"{name} differs from the manifest"


def _check_errors(dataset: Dataset, shard: str, footer: Footer) -> Iterator[str]:
    try:
        copy = read_table(pa.BufferReader(read(dataset.errors_url(shard))))
        if not copy.equals(footer.error_rows):
            yield (
                "its error rows differ from those in the data file; run the job again to repair it"
            )
    except ObjectMissing:
        yield "its file of error rows is missing; run the job again to repair it"
    except UNREADABLE as error:
        yield (
            "its file of error rows cannot be read; "
            f"delete it and run the job again to repair it ({one_line(error)})"
        )


def _count_removed(footer: Footer, file: pq.ParquetFile, removed: RemovedKeys) -> tuple[int, int]:
    """The rows and the error rows of a data file that have a removed key."""
    if not removed.hashes or "key" not in file.schema_arrow.names:
        return 0, 0
    rows = 0
    for batch in file.iter_batches(batch_size=4096, columns=["key"], use_threads=False):
        rows += len(removed.blocked(batch.column(0)))
    return rows, len(removed.blocked(footer.error_rows["key"]))


def check_leftovers(dataset: Dataset, removed: RemovedKeys) -> Leftovers:
    """Removed keys outside data files: in files of error rows, and in staging."""
    if not removed.hashes:
        return Leftovers()
    problems = list[str]()
    remaining = 0
    for url in error_files(dataset):
        with contextlib.suppress(ObjectMissing, *UNREADABLE):  # _check_errors reports these
            keys = read_table(pa.BufferReader(read(url)), ["key"])["key"]
            if rows := len(removed.blocked(keys)):
                name = url.removeprefix(f"{dataset.out}/")
                problems.append(
                    f"{name}: {count(rows, 'error row')} with a removed key{REMOVE_AGAIN}"
                )
                remaining += rows
    if staged := drop_removed_fragments(dataset, removed, only_look=True):
        problems.append(f"staging: {count(staged, 'fragment')} with a removed key{REMOVE_AGAIN}")
    return Leftovers(problems, remaining + staged)


def _check_rows(
    dataset: Dataset, shard: str, footer: Footer, file: pq.ParquetFile
) -> Iterator[str]:
    if not file.schema_arrow.remove_metadata().equals(dataset.schema):
        yield "its schema is not the dataset's"
        return
    digest = RowsDigest()
    indexes: list[int] = []
    problems: set[str] = set()
    for batch in file.iter_batches(batch_size=4096, use_threads=False):
        table = pa.Table.from_batches([batch])
        # a null vector does not fit the schema: _check_vectors names it, and the hash differs
        with contextlib.suppress(pa.ArrowInvalid):
            digest.add(table.cast(dataset.schema))
        indexes += table["index"].to_pylist()
        problems |= set(_check_values(dataset, shard, table))
    yield from sorted(problems)
    if len(indexes) != footer.rows:
        yield f"{count(len(indexes), 'row')}, but its footer says {footer.rows:,}"
    if indexes != sorted(set(indexes)):
        yield "rows are not in the order of their shard, or one appears twice"
    all_indexes = indexes + footer.error_rows["index"].to_pylist()
    is_whole = len(all_indexes) == footer.total - footer.removed
    if not is_whole or len({*all_indexes} & {*range(footer.total)}) != len(all_indexes):
        removed = f", without {footer.removed} removed rows" if footer.removed else ""
        yield f"rows and errors do not make up 0..{footer.total - 1}{removed}"
    if digest.hexdigest() != footer.rows_sha256:
        yield "the hash of its rows differs from its footer"


def _check_values(dataset: Dataset, shard: str, table: pa.Table) -> Iterator[str]:
    if set(table["shard"].to_pylist()) - {shard}:
        yield "a row names another shard"
    if dataset.job.labelled:
        yield from _check_labels(dataset, table)
    for vector in dataset.vectors:
        yield from _check_vectors(vector, table[vector.column].combine_chunks())


def _check_labels(dataset: Dataset, table: pa.Table) -> Iterator[str]:
    labels = dataset.spec.labels
    ids = table["label_id"].to_numpy()
    if len(ids) and not ((ids >= 0) & (ids < len(labels))).all():
        yield "a label_id is not a class of the model"
    elif table["label"].to_pylist() != [labels[label_id] for label_id in ids]:
        yield "a label is not the name of its label_id"
    scores = table["score"].to_numpy()
    if dataset.spec.score_function is ScoreFunction.NONE:
        if not np.isfinite(scores).all():
            yield "a score is not finite"
    elif not ((scores >= 0) & (scores <= HIGHEST_SCORE)).all():
        yield "a score is not within 0 and 1"


def _check_vectors(vector: VectorColumn, column: pa.Array) -> Iterator[str]:
    if column.null_count:
        yield f"{vector.column} holds a null"
        return
    flat = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    values = flat.reshape(-1, vector.dimension)
    if not np.isfinite(values).all():
        yield f"{vector.column} holds NaN or infinity"
    elif vector.normalize:
        deviation = np.abs(np.linalg.norm(values, axis=1) - 1).max(initial=0)
        if deviation > NORM_TOLERANCE[vector.dtype]:
            yield f"{vector.column} is not of unit length"
