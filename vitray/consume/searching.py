"""Search by similarity: the nearest rows of a dataset to a picture or to a row, by cosine.

A search is exact by default: it reads every row, in blocks. With an index, FAISS visits only lists
of near rows. It finds a share of the nearest rows, which is measured when the index is built. The
cosine of a zero vector is 0.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitray.dataset import (
    Dataset,
    choose_vector,
    is_complete,
    matrix_of,
    require_complete,
    require_dataset,
    require_outside,
    row_blocks,
    row_counts,
    success_manifest,
)
from vitray.decoding.decode import decode
from vitray.errors import JobError, ObjectMissing, count, one_line
from vitray.models import open_model, torch_threads_kept
from vitray.schema import Encoded, ModelOutputs, VectorColumn
from vitray.storage import absolute, exists, is_local, read, store_for

TRAIN_VECTORS = 64  # per list, to compute its centre
LEAST_VECTORS = 39  # per list; FAISS warns below that
RECALL = 0.95  # the search visits the fewest lists that reach this
RECALL_ROWS = 100  # queries that recall is measured with
NEIGHBOURS = 10  # of each such query
# rows of 768 floats, searched in 0.25 s on two cores: loading FAISS and an index takes as long
SMALL = 10_000


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: an image (path or URL), or a row by key, by shard and row, or by all."""

    image: str | None = None
    key: str | None = None
    shard: str | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One row of the dataset. label, score: None in a dataset without labels."""

    key: str
    shard: str
    index: int
    label: str | None
    score: float | None
    cosine: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The nearest rows, nearest first; equal cosines in the order of the dataset.

    recall: the measured recall of the index; None for an exact search.
    """

    out: str
    column: str
    query: str
    rows: int
    recall: float | None
    notes: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]

    def __str__(self) -> str:
        how = "exact"
        if self.recall is not None:
            how = f"by an index that finds {self.recall:.1%} of the nearest"
        lines = [f"nearest to {self.query} by {self.column}, {count(self.rows, 'row')}, {how}"]
        lines += [f"note: {note}" for note in self.notes]
        for n in self.neighbours:
            label = "" if n.label is None else f"  {_printable(n.label)} {n.score:.3f}"
            lines.append(f"{n.cosine:8.4f}  {_printable(n.key)}  ({n.shard}, {n.index}){label}")
        return "\n".join(lines)


def search(
    out: str, query: Query, k: int = 10, column: str | None = None, index: str | None = None
) -> SearchResult:
    """The k nearest committed rows.

    index: a file with a FAISS index of the complete dataset, built when it is missing or old.

    Raises JobError for a query without a row or a good image, ModelError for other weights than the
    dataset's.
    """
    dataset = require_dataset(out) if index is None else require_complete(out)
    vector = choose_vector(dataset, column)
    rows = _Rows(dataset, vector, row_counts(dataset))
    values, name, notes = _query_vector(rows, query)
    if not values.any():
        raise JobError(
            f"the vector of {name} is zero, so no row is nearer to it than another. "
            "Choose another query."
        )
    unit = values / np.linalg.norm(values)
    recall = None
    if index is None:
        nearest = _exact(rows, unit, k)
        if not is_complete(dataset):
            notes.append(f"{dataset.out} is not complete: its committed rows were searched")
    else:
        nearest, recall, index_notes = _indexed(rows, unit, k, index)
        notes += index_notes
    neighbours = tuple(Neighbour(**{"label": None, "score": None, **row}) for row in nearest)
    return SearchResult(
        dataset.out, vector.column, name, rows.total, recall, tuple(notes), neighbours
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows to search. counts: rows of each data file, by URL, in the order of the dataset."""

    dataset: Dataset
    vector: VectorColumn
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def reported_columns(self) -> list[str]:
        """The columns of a Neighbour, except its cosine."""
        labels = ["label", "score"] if self.dataset.job.labelled else []
        return ["key", "shard", "index", *labels]


def _query_vector(rows: _Rows, query: Query) -> tuple[np.ndarray, str, list[str]]:
    """A vector, float32 [D], its name for people, and notes about it."""
    row = (query.key, query.shard, query.row)
    if query.image is not None and row == (None, None, None):
        return _vector_of_image(rows, query.image), _printable(query.image), []
    if query.image is None and (query.key is not None or None not in row[1:]):
        return _vector_of_row(rows, query)
    raise JobError(
        "give one query: --image FILE, or --key KEY, or --shard ID and --row N (with --key, these "
        "choose among equal keys)."
    )


def _vector_of_image(rows: _Rows, url: str) -> np.ndarray:
    """The vector that the dataset's model gives an image, decoded like the dataset's images.

    Images that were decoded on a GPU are decoded on the CPU here.
    """
    dataset = rows.dataset
    try:
        pixels, (outcome,) = decode([Encoded(0, url, url, read(url))], dataset.decode_spec)
    except ObjectMissing as error:
        raise JobError(f"--image {error}. Check the path.") from error
    if outcome.reason is not None:
        raise JobError(
            f"--image {url} cannot be used: {outcome.reason} ({outcome.message}). Choose another."
        )
    job = dataset.job
    with torch_threads_kept():
        model = open_model(dataset.spec, ModelOutputs(dataset.vectors, 0), job.device, threads=1)
        vectors = model.predict(pixels).vectors[rows.vector.column]
    values: np.ndarray = vectors[0].astype(np.float32)
    return values


def _vector_of_row(rows: _Rows, query: Query) -> tuple[np.ndarray, str, list[str]]:
    """Like _query_vector, for a query by key, shard or row."""
    dataset = rows.dataset
    urls = list(rows.counts) if query.shard is None else [dataset.data_url(query.shard)]
    urls = [url for url in urls if url in rows.counts]
    first, matches = _first(dataset, urls, query, pc.equal)
    if first is None and query.key is not None:
        # the key of a loose file is its path; people know its name
        first, matches = _first(dataset, urls, query, _ends_with_name)
    if first is None:
        raise JobError(
            f"{dataset.out} has no good row like this. "
            "The key of a loose file is its path: give the path or its end. "
            f"Bad images, in {dataset.out}/{dataset.errors_folder}, have no vector."
        )
    name = f"{_printable(first['key'])} ({first['shard']}, {first['index']})"
    notes = list[str]()
    if matches > 1:
        notes.append(
            f"{matches:,} rows have this key, and the first is the query; --shard and --row choose"
        )
    return _stored_vector(rows, first["shard"], first["index"]), name, notes


def _ends_with_name(keys: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pc.ends_with(keys, f"/{name}")


def _stored_vector(rows: _Rows, shard: str, index: int) -> np.ndarray:
    """The vector of a row, float32 [D]."""
    column = rows.vector.column
    for block in row_blocks(rows.dataset, [rows.dataset.data_url(shard)], ["index", column]):
        matches = np.flatnonzero(block["index"].to_numpy() == index)
        if len(matches):
            vector: np.ndarray = matrix_of(block[column].slice(int(matches[0]), 1))[0]
            return vector.astype(np.float32)
    raise AssertionError


def _first(
    dataset: Dataset, urls: Iterable[str], query: Query, is_match: Callable[..., Any]
) -> tuple[dict[str, Any] | None, int]:
    """The first row that the query names, and the number of such rows.

    is_match: (column of keys, key) -> column of booleans.
    """
    first = None
    matches = 0
    for block in row_blocks(dataset, urls, ["key", "shard", "index"]):
        block = block if query.key is None else block.filter(is_match(block["key"], query.key))
        block = block if query.row is None else block.filter(pc.equal(block["index"], query.row))
        first = first or next(iter(block.slice(0, 1).to_pylist()), None)
        matches += block.num_rows
    return first, matches


def _exact(rows: _Rows, unit: np.ndarray, k: int) -> list[dict[str, Any]]:
    """The k nearest rows to a unit vector, of all rows."""
    column = rows.vector.column
    best: pa.Table | None = None
    for block in row_blocks(rows.dataset, rows.counts, [*rows.reported_columns, column]):
        values = matrix_of(block[column]).astype(np.float32)
        # one sum per row: the last bit of a matrix product depends on the row's position, so equal
        # vectors would not have equal cosines
        lengths = np.sqrt((values * values).sum(1))
        cosines = np.clip((values * unit).sum(1) / np.where(lengths > 0, lengths, 1), -1, 1)
        block = block.drop_columns([column]).append_column("cosine", pa.array(cosines))
        best = block if best is None else pa.concat_tables([best, block])
        best = best.take(np.argsort(-best["cosine"].to_numpy(), kind="stable")[:k])
    return [] if best is None else best.to_pylist()


def _indexed(
    rows: _Rows, unit: np.ndarray, k: int, url: str
) -> tuple[list[dict[str, Any]], float, list[str]]:
    """The nearest rows by an index, the recall of that index, and notes about it."""
    faiss = _faiss()
    path = absolute(url)
    require_outside(rows.dataset, "--index", path)
    if not is_local(path) or not rows.total:
        raise JobError(
            f"--index {path}: it must be a local file, and the dataset must have rows. "
            "Leave it out for an exact search."
        )
    notes = list[str]()
    if rows.total < SMALL:
        notes.append(
            f"with fewer than {SMALL:,} rows, a search without --index is exact and about as fast"
        )
    try:
        metadata = _up_to_date(rows, path)
        if metadata is None:
            metadata = _build(faiss, rows, path)
            notes.append(
                f"built {path}: {metadata['visited']} of {metadata['lists']} lists are visited; "
                f"recall measured on {count(metadata['measured'], 'row')}"
            )
        index = faiss.read_index(path, faiss.IO_FLAG_MMAP)
        cosines, positions = index.search(unit[None], min(k, rows.total))
    except RuntimeError as error:
        raise JobError(
            f"--index {path}: {one_line(error)}. Delete it and {path}.json, or choose another file."
        ) from error
    by_position = {
        int(position): float(cosine)
        for position, cosine in zip(positions[0], cosines[0])
        if position >= 0
    }
    nearest = [
        {**row, "cosine": min(1.0, max(-1.0, by_position[position]))}
        for position, row in _rows_at(rows, sorted(by_position))
    ]
    return sorted(nearest, key=lambda row: -row["cosine"]), metadata["recall"], notes


def _faiss() -> Any:
    """The FAISS module. Raises JobError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise JobError(
            "--index needs FAISS: pip install 'vitray[search]', or leave it out for an exact "
            "search."
        ) from error
    return faiss


def _up_to_date(rows: _Rows, path: str) -> dict[str, Any] | None:
    """The content of FILE.json for an index of the dataset as it is; None: build the index.

    Raises JobError for a file that is another index, or no index.
    """
    try:
        metadata = json.loads(read(f"{path}.json"))
        owner = (metadata["source"], metadata["column"])
    except (ObjectMissing, ValueError, KeyError, TypeError):
        metadata = {}
        owner = None
    identity = _identity(rows)
    has_index = exists(path)
    is_owner = owner == (identity["source"], identity["column"])
    if not is_owner and (has_index or exists(f"{path}.json")):
        raise JobError(
            f"--index {path} exists and is not an index of {rows.vector.column} of "
            f"{rows.dataset.out}: choose another file."
        )
    return metadata if has_index and metadata.items() >= identity.items() else None


def _identity(rows: _Rows) -> dict[str, Any]:
    """The part of FILE.json that names the dataset, its state and the vector column."""
    return {
        "source": rows.dataset.out,
        "column": rows.vector.column,
        "fingerprint": rows.dataset.fingerprint,
        "manifest": success_manifest(rows.dataset.out),
    }


def _build(faiss: Any, rows: _Rows, path: str) -> dict[str, Any]:
    """Write the index and FILE.json; returns the content of FILE.json.

    All vectors are in memory meanwhile, as float32.
    """
    identity = _identity(rows)
    lists = max(1, min(math.isqrt(rows.total), rows.total // LEAST_VECTORS))
    share = min(1.0, TRAIN_VECTORS * lists / rows.total)
    rng = np.random.default_rng(0)
    sample = np.concatenate(
        [block[rng.random(len(block)) <= share] for block in _unit_vectors(faiss, rows)]
    )
    dimension = rows.vector.dimension
    index = faiss.index_factory(dimension, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    for block in _unit_vectors(faiss, rows):
        index.add(block)
    queries = sample[:: max(1, len(sample) // RECALL_ROWS)][:RECALL_ROWS]
    recall = _tune(index, lists, queries)
    metadata = {
        **identity,
        "recall": recall,
        "measured": len(queries),
        "lists": lists,
        "visited": index.nprobe,
    }
    # until the last line of this function FILE.json names its owner, and fits no state of a dataset
    owner = {name: identity[name] for name in ("source", "column")}
    store_for(path).replace(f"{path}.json", json.dumps(owner).encode())
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        faiss.write_index(index, temporary)
        os.replace(temporary, path)
    finally:
        store_for(path).delete([temporary])
    store_for(path).replace(f"{path}.json", json.dumps(metadata, indent=1).encode())
    return metadata


def _unit_vectors(faiss: Any, rows: _Rows) -> Iterator[np.ndarray]:
    """Blocks of unit vectors, float32; zeros stay zeros."""
    for block in row_blocks(rows.dataset, rows.counts, [rows.vector.column]):
        values = matrix_of(block[rows.vector.column]).astype(np.float32)
        faiss.normalize_L2(values)
        yield values


def _tune(index: Any, lists: int, queries: np.ndarray) -> float:
    """Set the number of lists that the index visits: the least power of two that reaches RECALL.

    Returns the recall. A visit of all lists is an exact search. A query's first hit does not
    count: it is the query itself.
    """
    index.nprobe = lists
    exact = [{*row[1:].tolist()} - {-1} for row in index.search(queries, NEIGHBOURS + 1)[1]]
    total = sum(map(len, exact))
    recall = 1.0
    for visited in [*(1 << bit for bit in range(lists.bit_length()) if 1 << bit < lists), lists]:
        index.nprobe = visited
        hits = index.search(queries, NEIGHBOURS + 1)[1]
        matches = sum(len(nearest & {*row.tolist()}) for nearest, row in zip(exact, hits))
        recall = matches / total if total else 1.0
        if recall >= RECALL:
            break
    return recall


def _rows_at(rows: _Rows, positions: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position, row) of these positions in the whole dataset, in order."""
    file_start = 0
    for url, length in rows.counts.items():
        in_file = [p for p in positions if file_start <= p < file_start + length]
        start = file_start
        for block in row_blocks(rows.dataset, [url] if in_file else [], rows.reported_columns):
            in_block = [p for p in in_file if start <= p < start + len(block)]
            offsets = pa.array([p - start for p in in_block], pa.int64())
            yield from zip(in_block, block.take(offsets).to_pylist())
            start += len(block)
        file_start += length


def _printable(text: str) -> str:
    """Text from data, as one line for a person."""
    return text if text.isprintable() else repr(text)
