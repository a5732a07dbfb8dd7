"""What another model, or other settings, changed: two datasets made from the same shards, row
against row.

A shard id names one version of one input, so that equal ids hold the same images in the same order;
everything else is counted apart. Memory holds one shard of each, and a sample of vectors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitray.dataset import data_files, matrix_of, read_table, require_dataset, shard_of
from vitray.errors import JobError, shortened
from vitray.storage import absolute, store_for

SAMPLE = 2000  # vectors that drift is measured on
NEIGHBOURS = 10
MOVES = 20  # pairs of labels that are told
EXAMPLES = 6  # rows named of each: six pictures fill a line of the page
TOLD = 3  # of these as text
WIDTH = 60  # characters of a label or key


@dataclass(frozen=True, slots=True)
class Move:
    """Images whose label went from one to another. examples: keys of the first; refs: their (shard,
    index), since keys may repeat.
    """

    old: str
    new: str
    images: int
    examples: tuple[str, ...]
    refs: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of `old` and `new`. agreement, score_shift, cka, neighbours: None where there is nothing to
    compare.

    agreement: share of `rows` with the same label. score_shift: mean of new minus old score, over
    rows of the same label.
    cka: linear centered kernel alignment of the two spaces, 0..1 (Kornblith et al. 2019,
    arXiv:1905.00414).
    neighbours: share of an image's nearest NEIGHBOURS by cosine that both spaces name. Both on a
    sample of at most SAMPLE rows.
    """

    old: str
    new: str
    rows: int
    only_old_rows: int  # an error row, or none, in the other
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
            f"in one alone       {self.only_old_rows:,} rows and {self.only_old_shards} shards of "
            f"the old one, "
            f"{self.only_new_rows:,} and {self.only_new_shards} of the new one",
        ]
        if self.agreement is not None:
            lines.append(f"same label         {self.agreement:.4%}")
        if self.score_shift is not None:
            lines.append(f"score of these     {self.score_shift:+.4f} in the mean")
        if self.cka is not None:
            lines.append(
                f"embeddings         CKA {self.cka:.4f}, {self.neighbours:.1%} of {NEIGHBOURS} "
                f"neighbours shared, {self.sample:,} rows"
            )
        for move in self.moves:
            old, new, *keys = (
                shortened(text, WIDTH) for text in (move.old, move.new, *move.examples[:TOLD])
            )
            lines.append(f"  {move.images:>8,}  {old} -> {new}  ({', '.join(keys)})")
        return "\n".join(lines)


def compare(old: str, new: str) -> Comparison:
    """Row against row. Raises JobError when one of the two is no dataset, or when they have no
    shard in common.
    """
    datasets = [require_dataset(out) for out in (old, new)]
    first, second = (
        {shard_of(url): url for url in data_files(dataset.out)} for dataset in datasets
    )
    both = sorted(first.keys() & second.keys())
    if not both:
        raise JobError(
            f"{absolute(old)} and {absolute(new)} have no shard in common: they were not made "
            f"from the same input, or of loose files "
            "in other groups (vitray backfill keeps them)."
        )
    rows = agreed = 0
    alone, shift = [0, 0], 0.0
    moves, examples = (
        Counter[tuple[str, str]](),
        dict[tuple[str, str], list[tuple[str, tuple[str, int]]]](),
    )
    vectors: list[tuple[np.ndarray, np.ndarray]] = []
    labelled = all(dataset.job.labelled for dataset in datasets)
    embedded = [next((vector.column for vector in dataset.vectors), None) for dataset in datasets]
    share = max(1, SAMPLE // len(both))
    for shard in both:
        a, b = (
            _table(urls[shard], labelled, vector) for urls, vector in zip((first, second), embedded)
        )
        _, at_a, at_b = np.intersect1d(
            a["index"], b["index"], assume_unique=True, return_indices=True
        )
        rows += len(at_a)
        alone[0] += len(a) - len(at_a)
        alone[1] += len(b) - len(at_b)
        a, b = a.take(at_a), b.take(at_b)
        if labelled:
            same = pc.equal(a["label"].cast(pa.string()), b["label"].cast(pa.string())).to_numpy()
            agreed += int(same.sum())
            shift += float((b["score"].to_numpy() - a["score"].to_numpy())[same].sum())
            for n in np.flatnonzero(~same):
                pair = (a["label"][int(n)].as_py(), b["label"][int(n)].as_py())
                moves[pair] += 1
                if moves[pair] <= EXAMPLES:
                    examples.setdefault(pair, []).append(
                        (a["key"][int(n)].as_py(), (shard, a["index"][int(n)].as_py()))
                    )
        if None not in embedded and len(at_a) and len(vectors) * share < SAMPLE:
            some = np.linspace(0, len(at_a) - 1, min(share, len(at_a))).astype(int)
            vectors.append((matrix_of(a["vector"].take(some)), matrix_of(b["vector"].take(some))))
    x, y = (
        np.concatenate([p[n] for p in vectors]).astype(float) if vectors else np.empty((0, 1))
        for n in (0, 1)
    )
    enough = len(x) > NEIGHBOURS
    return Comparison(
        old=absolute(old),
        new=absolute(new),
        rows=rows,
        only_old_rows=alone[0],
        only_new_rows=alone[1],
        only_old_shards=len(first.keys() - second.keys()),
        only_new_shards=len(second.keys() - first.keys()),
        agreement=agreed / rows if labelled and rows else None,
        moves=tuple(
            Move(*pair, count, *zip(*examples[pair])) for pair, count in moves.most_common(MOVES)
        ),
        score_shift=shift / agreed if labelled and agreed else None,
        sample=len(x),
        cka=linear_cka(x, y) if enough else None,
        neighbours=neighbour_overlap(x, y, NEIGHBOURS) if enough else None,
    )


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Of [n, p] and [n, q] for the same n rows: 1 when one is the other turned or scaled, near 0
    when they have nothing in common.
    """
    x, y = x - x.mean(0), y - y.mean(0)
    cross, within = (
        np.square(x.T @ y).sum(),
        np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum()),
    )
    return float(cross / within) if within else 0.0


def neighbour_overlap(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The mean share of each row's k nearest other rows, by cosine, that are the same in [n, p] and
    in [n, q].
    """
    near = [_nearest(space, k) for space in (x, y)]
    return float(np.mean([len(set(one) & set(other)) / k for one, other in zip(*near)]))


def _nearest(x: np.ndarray, k: int) -> np.ndarray:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    likeness = unit @ unit.T
    np.fill_diagonal(likeness, -np.inf)
    return np.argpartition(-likeness, k, axis=1)[:, :k]


def _table(url: str, labelled: bool, vector: str | None) -> pa.Table:
    names = [
        "index",
        "key",
        *(["label", "score"] if labelled else []),
        *([vector] if vector else []),
    ]
    with store_for(url).open(url) as stream:
        table = read_table(stream, names)
    return table.rename_columns(
        ["vector" if name == vector else name for name in table.column_names]
    )
