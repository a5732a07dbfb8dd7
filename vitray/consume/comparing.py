"""The differences between two datasets of the same shards, made by other models or settings.

A shard id names one version of one input: equal ids hold the same images in the same order. All
other shards are only counted. Memory holds one shard of each dataset, and a sample of vectors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitray.dataset import Dataset, data_files, matrix_of, read_table, require_dataset, shard_of
from vitray.errors import JobError, count, shortened
from vitray.evaluation.metrics import mean_overlap
from vitray.storage import absolute, store_for
from vitray.vectors import unit

SAMPLE = 2000  # vectors for CKA and neighbours
NEIGHBOURS = 10
MOVES = 20  # pairs of labels that are reported
EXAMPLES = 6  # rows of each pair: six pictures fill a line of the page
EXAMPLES_AS_TEXT = 3
TEXT_CHARS = 60  # of a label or key


@dataclass(frozen=True, slots=True)
class Move:
    """Images whose label changed from `old` to `new`.

    examples: keys of the first ones; refs: their (shard, index), since keys may repeat.
    """

    old: str
    new: str
    images: int
    examples: tuple[str, ...]
    refs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of the datasets `old` and `new`.

    agreement: share of `rows` with the same label. score_shift: mean of new minus old score, over
    rows with the same label. cka: linear centered kernel alignment of the two embedding spaces,
    0..1 (Kornblith et al. 2019, arXiv:1905.00414). neighbours: share of an image's nearest
    NEIGHBOURS by cosine that both spaces have in common. cka and neighbours come from a sample of
    at most SAMPLE rows. All four are None where there is nothing to compare.
    """

    old: str
    new: str
    rows: int
    only_old_rows: int  # an error row, or no row, in the other dataset
    only_new_rows: int
    only_old_shards: int
    only_new_shards: int
    agreement: float | None
    moves: tuple[Move, ...]
    score_shift: float | None
    sample: int
    cka: float | None
    neighbours: float | None

    def __str__(self) -> str:
        lines = [
            f"{self.old} -> {self.new}",
            f"rows in both       {self.rows:,}",
            f"only in old        {count(self.only_old_rows, 'row')} and "
            f"{count(self.only_old_shards, 'shard')}",
            f"only in new        {count(self.only_new_rows, 'row')} and "
            f"{count(self.only_new_shards, 'shard')}",
        ]
        if self.agreement is not None:
            lines.append(f"same label         {self.agreement:.4%}")
        if self.score_shift is not None:
            lines.append(f"mean score change  {self.score_shift:+.4f} for these rows")
        if self.cka is not None:
            lines.append(
                f"embeddings         CKA {self.cka:.4f}, {self.neighbours:.1%} of {NEIGHBOURS} "
                f"neighbours shared, {count(self.sample, 'row')}"
            )
        for move in self.moves:
            old, new = shortened(move.old, TEXT_CHARS), shortened(move.new, TEXT_CHARS)
            keys = [shortened(key, TEXT_CHARS) for key in move.examples[:EXAMPLES_AS_TEXT]]
            lines.append(f"  {move.images:>8,}  {old} -> {new}  ({', '.join(keys)})")
        return "\n".join(lines)


def compare(old: str, new: str) -> Comparison:
    """Two datasets, row against row.

    Raises JobError when one of the two is not a dataset, or when they have no shard in common.
    """
    datasets = (require_dataset(old), require_dataset(new))
    old_urls, new_urls = (_urls_by_shard(dataset.out) for dataset in datasets)
    common = sorted(old_urls.keys() & new_urls.keys())
    if not common:
        raise JobError(
            f"{absolute(old)} and {absolute(new)} have no shard in common: "
            "they were made from different inputs, "
            "or of loose files in other groups (vitray backfill keeps the groups)."
        )
    labelled = all(dataset.job.labelled for dataset in datasets)
    old_column, new_column = (_first_vector(dataset) for dataset in datasets)
    has_vectors = old_column is not None and new_column is not None
    sums = _Sums()
    rows_per_shard = max(1, SAMPLE // len(common))
    for shard in common:
        tables = _aligned(
            _table(old_urls[shard], labelled, old_column),
            _table(new_urls[shard], labelled, new_column),
        )
        sums.add_rows(tables)
        if labelled:
            sums.add_labels(shard, tables)
        if has_vectors and len(tables.old) and len(sums.old_vectors) * rows_per_shard < SAMPLE:
            sums.add_vectors(tables, rows_per_shard)
    return sums.comparison(
        datasets,
        labelled,
        only_old_shards=len(old_urls.keys() - new_urls.keys()),
        only_new_shards=len(new_urls.keys() - old_urls.keys()),
    )


def _urls_by_shard(out: str) -> dict[str, str]:
    return {shard_of(url): url for url in data_files(out)}


def _first_vector(dataset: Dataset) -> str | None:
    return next((vector.column for vector in dataset.vectors), None)


@dataclass(frozen=True, slots=True)
class _Aligned:
    """The rows of one shard that both datasets have, in the same order."""

    old: pa.Table
    new: pa.Table
    only_old_rows: int
    only_new_rows: int


def _aligned(old: pa.Table, new: pa.Table) -> _Aligned:
    _, at_old, at_new = np.intersect1d(
        old["index"], new["index"], assume_unique=True, return_indices=True
    )
    return _Aligned(
        old=old.take(at_old),
        new=new.take(at_new),
        only_old_rows=len(old) - len(at_old),
        only_new_rows=len(new) - len(at_new),
    )


@dataclass(slots=True)
class _Sums:
    """What the shards compared so far add up to."""

    rows: int = 0
    only_old_rows: int = 0
    only_new_rows: int = 0
    agreed: int = 0
    score_shift: float = 0.0
    moves: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[tuple[str, tuple[str, int]]]] = field(default_factory=dict)
    old_vectors: list[np.ndarray] = field(default_factory=list)
    new_vectors: list[np.ndarray] = field(default_factory=list)

    def add_rows(self, tables: _Aligned) -> None:
        self.rows += len(tables.old)
        self.only_old_rows += tables.only_old_rows
        self.only_new_rows += tables.only_new_rows

    def add_labels(self, shard: str, tables: _Aligned) -> None:
        old, new = tables.old, tables.new
        same = pc.equal(old["label"].cast(pa.string()), new["label"].cast(pa.string())).to_numpy()
        self.agreed += int(same.sum())
        self.score_shift += float((new["score"].to_numpy() - old["score"].to_numpy())[same].sum())
        for row in np.flatnonzero(~same).tolist():
            pair = (old["label"][row].as_py(), new["label"][row].as_py())
            self.moves[pair] += 1
            if self.moves[pair] <= EXAMPLES:
                ref = (shard, old["index"][row].as_py())
                self.examples.setdefault(pair, []).append((old["key"][row].as_py(), ref))

    def add_vectors(self, tables: _Aligned, count: int) -> None:
        """Adds the vectors of `count` rows, evenly spaced."""
        rows = len(tables.old)
        sample = np.linspace(0, rows - 1, min(count, rows)).astype(int)
        self.old_vectors.append(matrix_of(tables.old["vector"].take(sample)))
        self.new_vectors.append(matrix_of(tables.new["vector"].take(sample)))

    def comparison(
        self,
        datasets: tuple[Dataset, Dataset],
        labelled: bool,
        only_old_shards: int,
        only_new_shards: int,
    ) -> Comparison:
        old_sample, new_sample = _stacked(self.old_vectors), _stacked(self.new_vectors)
        is_enough = len(old_sample) > NEIGHBOURS
        return Comparison(
            old=datasets[0].out,
            new=datasets[1].out,
            rows=self.rows,
            only_old_rows=self.only_old_rows,
            only_new_rows=self.only_new_rows,
            only_old_shards=only_old_shards,
            only_new_shards=only_new_shards,
            agreement=self.agreed / self.rows if labelled and self.rows else None,
            moves=tuple(self._move(pair, count) for pair, count in self.moves.most_common(MOVES)),
            score_shift=self.score_shift / self.agreed if labelled and self.agreed else None,
            sample=len(old_sample),
            cka=linear_cka(old_sample, new_sample) if is_enough else None,
            neighbours=(
                neighbour_overlap(old_sample, new_sample, NEIGHBOURS) if is_enough else None
            ),
        )

    def _move(self, pair: tuple[str, str], images: int) -> Move:
        examples = self.examples[pair]
        keys, refs = (key for key, _ in examples), (ref for _, ref in examples)
        return Move(*pair, images, tuple(keys), tuple(refs))


def _stacked(blocks: list[np.ndarray]) -> np.ndarray:
    """The vectors of all blocks as float64 [N, D]; [0, 1] for none."""
    return np.concatenate(blocks).astype(float) if blocks else np.empty((0, 1))


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """The similarity of [n, p] and [n, q] for the same n rows, 0..1.

    It is 1 when one is the other rotated or scaled, and near 0 when they have nothing in common.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.square(x.T @ y).sum()
    within = np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum())
    return float(cross / within) if within else 0.0


def neighbour_overlap(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The mean share of a row's k nearest other rows, by cosine, that [n, p] and [n, q] share."""
    return mean_overlap(_nearest(x, k).tolist(), _nearest(y, k).tolist(), k)


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    """The numbers of each row's k nearest other rows, by cosine, in no order: [n, k]."""
    directions = unit(x)
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, k, axis=1)[:, :k]


def _table(url: str, labelled: bool, vector: str | None) -> pa.Table:
    """The columns of a data file that are compared; the vectors are called `vector`."""
    names = ["index", "key"]
    if labelled:
        names += ["label", "score"]
    if vector is not None:
        names.append(vector)
    with store_for(url).open(url) as stream:
        table = read_table(stream, names)
    return table.rename_columns(
        ["vector" if name == vector else name for name in table.column_names]
    )
