"""Which images are like this one: the nearest rows of a dataset by cosine, to a picture or to a
row.

Exact by default: every row is read, in blocks. With an index FAISS visits only lists of rows that
are near; how many of the nearest that finds was measured when the index was built. A vector of
zeros is like nothing: its cosine is 0.
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
)
from vitray.decoding.decode import decode
from vitray.errors import JobError, ObjectMissing, one_line
from vitray.models import open_model, torch_threads_kept
from vitray.schema import Encoded, VectorColumn
from vitray.storage import absolute, exists, is_local, join, read, store_for

TRAIN, LEAST = 64, 39  # vectors from which the centre of a list is found; below 39 FAISS warns
RECALL = 0.95  # as many lists are visited as this needs
RECALL_ROWS, NEIGHBOURS = 100, 10  # what it is measured on
# rows; as many of 768 floats are searched in 0.25 s on two cores, as long as FAISS and an index
# take to load
SMALL = 10_000

Counts = Mapping[str, int]  # rows of each data file, by URL, in the order of the dataset


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: an image (path or URL), or a row: by its key, by shard and row, or by all
    three.
    """

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
class Found:
    """The nearest rows, nearest first; of equal cosines the first in the order of the dataset.
    recall: of an index, as measured.
    """

    out: str
    column: str
    query: str
    rows: int
    recall: float | None
    notes: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]

    def __str__(self) -> str:
        how = (
            "exact"
            if self.recall is None
            else f"by an index that finds {self.recall:.1%} of the nearest"
        )
        lines = [f"nearest to {self.query} by {self.column}, {self.rows:,} rows, {how}"]
        lines += [f"note: {note}" for note in self.notes]
        for n in self.neighbours:
            label = "" if n.label is None else f"  {_shown(n.label)} {n.score:.3f}"
            lines.append(f"{n.cosine:8.4f}  {_shown(n.key)}  ({n.shard}, {n.index}){label}")
        return "\n".join(lines)


def search(
    out: str, query: Query, k: int = 10, column: str | None = None, index: str | None = None
) -> Found:
    """The k nearest of the rows that are committed. index: a file with a FAISS index of the
    complete dataset, made when missing or old.

    Raises JobError when the query names no row or no good image, ModelError when the weights are
    not the dataset's.
    """
    dataset = require_dataset(out) if index is None else require_complete(out)
    vector, counts = choose_vector(dataset, column), row_counts(dataset)
    values, said, notes = _query(dataset, vector, query, counts)
    if not values.any():
        raise JobError(
            f"the vector of {said} is zero, so that no row is nearer to it than another. Choose "
            f"another query."
        )
    unit, recall = values / np.linalg.norm(values), None
    if index is None:
        rows = _exact(dataset, vector, counts, unit, k)
        notes += (
            []
            if is_complete(dataset)
            else [f"{dataset.out} is not complete: the rows that it has were searched"]
        )
    else:
        rows, recall, more = _indexed(dataset, vector, counts, unit, k, index)
        notes += more
    near = tuple(Neighbour(**{"label": None, "score": None, **row}) for row in rows)
    return Found(dataset.out, vector.column, said, sum(counts.values()), recall, tuple(notes), near)


def _query(
    dataset: Dataset, vector: VectorColumn, query: Query, counts: Counts
) -> tuple[np.ndarray, str, list[str]]:
    """A vector, float32 [D], what to call it, and what to tell of it."""
    row = (query.key, query.shard, query.row)
    if query.image is not None and row == (None, None, None):
        return _of_image(dataset, vector, query.image), _shown(query.image), []
    if query.image is None and (query.key is not None or None not in row[1:]):
        return _of_row(dataset, vector, query, counts)
    raise JobError(
        "give one query: --image FILE, or --key KEY, or --shard ID and --row N (with --key, these "
        "choose among equal keys)."
    )


def _of_image(dataset: Dataset, vector: VectorColumn, url: str) -> np.ndarray:
    """What the dataset's model says of a picture, decoded as the dataset's images were (on the CPU,
    where that was a GPU's work).
    """
    try:
        pixels, (outcome,) = decode([Encoded(0, url, url, read(url))], dataset.decode_spec)
    except ObjectMissing as error:
        raise JobError(f"--image {error}. Check the path.") from error
    if outcome.reason is not None:
        raise JobError(
            f"--image {url} is no good image: {outcome.reason} ({outcome.message}). Choose another."
        )
    job = dataset.job
    with torch_threads_kept():
        model = open_model(dataset.spec, list(dataset.vectors), 0, False, job.device, threads=1)
        values: np.ndarray = model.predict(pixels).vectors[vector.column][0].astype(np.float32)
    return values


def _of_row(
    dataset: Dataset, vector: VectorColumn, query: Query, counts: Counts
) -> tuple[np.ndarray, str, list[str]]:
    urls = [url for url in counts if query.shard is None or url == dataset.data_url(query.shard)]
    first, matches = _first(dataset, urls, query, pc.equal)
    if (
        first is None and query.key is not None
    ):  # of a loose file, whose key is its path, people know the name
        first, matches = _first(
            dataset, urls, query, lambda keys, key: pc.ends_with(keys, f"/{key}")
        )
    if first is None:
        raise JobError(
            f"{dataset.out} has no good row like this. Keys of loose files are their paths, of "
            f"which the end will do; bad images, "
            f"in {dataset.out}/{dataset.errors_folder}, have no vector."
        )
    said = f"{_shown(first['key'])} ({first['shard']}, {first['index']})"
    notes = (
        [f"{matches:,} rows have this key, and the first is the query; --shard and --row choose"]
        if matches > 1
        else []
    )
    for block in row_blocks(dataset, [dataset.data_url(first["shard"])], ["index", vector.column]):
        if at := np.flatnonzero(block["index"].to_numpy() == first["index"]).tolist():
            return (
                matrix_of(block[vector.column].slice(at[0], 1))[0].astype(np.float32),
                said,
                notes,
            )
    raise AssertionError


def _first(
    dataset: Dataset, urls: Iterable[str], query: Query, same: Callable[..., Any]
) -> tuple[dict[str, Any] | None, int]:
    """The first row that the query names, and how many it names. same: whether keys are the
    query's.
    """
    first, matches = None, 0
    for block in row_blocks(dataset, urls, ["key", "shard", "index"]):
        block = block if query.key is None else block.filter(same(block["key"], query.key))
        block = block if query.row is None else block.filter(pc.equal(block["index"], query.row))
        first = first or next(iter(block.slice(0, 1).to_pylist()), None)
        matches += block.num_rows
    return first, matches


def _exact(
    dataset: Dataset, vector: VectorColumn, counts: Counts, unit: np.ndarray, k: int
) -> list[dict[str, Any]]:
    best: pa.Table | None = None
    for block in row_blocks(dataset, counts, [*_told(dataset), vector.column]):
        values = matrix_of(block[vector.column]).astype(np.float32)
        # sums of products a row: a matrix product's last bit depends on where a row stands, and
        # equal vectors would not tie
        lengths = np.sqrt((values * values).sum(1))
        cosines = np.clip((values * unit).sum(1) / np.where(lengths > 0, lengths, 1), -1, 1)
        block = block.drop_columns([vector.column]).append_column("cosine", pa.array(cosines))
        best = block if best is None else pa.concat_tables([best, block])
        best = best.take(np.argsort(-best["cosine"].to_numpy(), kind="stable")[:k])
    return [] if best is None else best.to_pylist()


def _indexed(
    dataset: Dataset, vector: VectorColumn, counts: Counts, unit: np.ndarray, k: int, url: str
) -> tuple[list[dict[str, Any]], float, list[str]]:
    """Rows, the index's recall, and what to tell of it."""
    try:
        import faiss
    except ImportError as error:
        raise JobError(
            "--index needs FAISS: pip install 'vitray[search]', or leave it out for an exact "
            "search."
        ) from error
    path, rows = absolute(url), sum(counts.values())
    require_outside(dataset, "--index", path)
    if not is_local(path) or not rows:
        raise JobError(
            f"--index {path}: it must be a local file, and the dataset must have rows. Leave it "
            f"out for an exact search."
        )
    notes = (
        [f"with fewer than {SMALL:,} rows, a search without --index is exact and about as fast"]
        if rows < SMALL
        else []
    )
    try:
        metadata, is_new = _up_to_date(dataset, vector, path), False
        if metadata is None:
            metadata, is_new = _build(faiss, dataset, vector, path, counts), True
        cosines, near = faiss.read_index(path, faiss.IO_FLAG_MMAP).search(unit[None], min(k, rows))
    except RuntimeError as error:
        raise JobError(
            f"--index {path}: {one_line(error)}. Delete it and {path}.json, or choose another file."
        ) from error
    if is_new:
        notes.append(
            f"built {path}: {metadata['visited']} of {metadata['lists']} lists are visited; "
            f"recall measured on {metadata['measured']} rows"
        )
    hits = {int(at): float(cosine) for at, cosine in zip(near[0], cosines[0]) if at >= 0}
    found = [
        {**row, "cosine": min(1.0, max(-1.0, hits[at]))}
        for at, row in _rows_at(dataset, counts, sorted(hits))
    ]
    return sorted(found, key=lambda row: -row["cosine"]), metadata["recall"], notes


def _up_to_date(dataset: Dataset, vector: VectorColumn, path: str) -> dict[str, Any] | None:
    """What FILE.json says of an index that fits the dataset as it is, None when it is to be built.
    Raises JobError at another's file.
    """
    try:
        metadata = json.loads(read(f"{path}.json"))
        owner = (metadata["source"], metadata["column"])
    except (ObjectMissing, ValueError, KeyError, TypeError):
        metadata, owner = {}, None
    mine, is_there = _identity(dataset, vector), exists(path) or exists(f"{path}.json")
    if is_there and owner != (mine["source"], mine["column"]):
        raise JobError(
            f"--index {path} is there and no index of {vector.column} of {dataset.out}: choose "
            f"another file."
        )
    return metadata if exists(path) and metadata.items() >= mine.items() else None


def _identity(dataset: Dataset, vector: VectorColumn) -> dict[str, Any]:
    manifest = json.loads(read(join(dataset.out, "_SUCCESS.json")))["manifest"]
    return {
        "source": dataset.out,
        "column": vector.column,
        "fingerprint": dataset.fingerprint,
        "manifest": manifest,
    }


def _build(
    faiss: Any, dataset: Dataset, vector: VectorColumn, path: str, counts: Counts
) -> dict[str, Any]:
    """What was written into FILE.json, after the index. All vectors are in memory meanwhile, as
    float32.
    """
    identity, rows = _identity(dataset, vector), sum(counts.values())
    lists = max(1, min(math.isqrt(rows), rows // LEAST))
    share, rng = min(1.0, TRAIN * lists / rows), np.random.default_rng(0)
    sample = np.concatenate(
        [block[rng.random(len(block)) <= share] for block in _units(faiss, dataset, vector, counts)]
    )
    index = faiss.index_factory(vector.dimension, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    for block in _units(faiss, dataset, vector, counts):
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
    # until the last line the file is ours, and fits no dataset
    store_for(path).replace(
        f"{path}.json", json.dumps({name: identity[name] for name in ("source", "column")}).encode()
    )
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        faiss.write_index(index, temporary)
        os.replace(temporary, path)
    finally:
        store_for(path).delete([temporary])
    store_for(path).replace(f"{path}.json", json.dumps(metadata, indent=1).encode())
    return metadata


def _units(
    faiss: Any, dataset: Dataset, vector: VectorColumn, counts: Counts
) -> Iterator[np.ndarray]:
    """Blocks of unit vectors, float32; zeros stay zeros."""
    for block in row_blocks(dataset, counts, [vector.column]):
        values = matrix_of(block[vector.column]).astype(np.float32)
        faiss.normalize_L2(values)
        yield values


def _tune(index: Any, lists: int, queries: np.ndarray) -> float:
    """Leaves the index with the least power of two of lists to visit that reaches RECALL; returns
    what it reaches.

    All lists together are an exact search. A query's first hit does not count: it is itself.
    """
    index.nprobe = lists
    nearest = [{*row[1:].tolist()} - {-1} for row in index.search(queries, NEIGHBOURS + 1)[1]]
    total, recall = sum(map(len, nearest)), 1.0
    for visited in [*(1 << bit for bit in range(lists.bit_length()) if 1 << bit < lists), lists]:
        index.nprobe = visited
        found = index.search(queries, NEIGHBOURS + 1)[1]
        recall = (
            sum(len(near & {*row.tolist()}) for near, row in zip(nearest, found)) / total
            if total
            else 1.0
        )
        if recall >= RECALL:
            break
    return recall


def _rows_at(
    dataset: Dataset, counts: Counts, positions: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows at these places of the whole dataset, in order."""
    start = 0
    for url, rows in counts.items():
        at = start
        inside = [position for position in positions if start <= position < start + rows]
        for block in row_blocks(dataset, [url] if inside else [], _told(dataset)):
            here = [position for position in inside if at <= position < at + len(block)]
            yield from zip(
                here,
                block.take(pa.array([position - at for position in here], pa.int64())).to_pylist(),
            )
            at += len(block)
        start += rows


def _told(dataset: Dataset) -> list[str]:
    return ["key", "shard", "index", *(["label", "score"] if dataset.job.labelled else [])]


def _shown(text: str) -> str:
    """One line for a person: names come from data."""
    return text if text.isprintable() else repr(text)
