"""Sums from one pass over the data files, and the rows to show.

The sums are of labels, scores, true labels, duplicates and failures. Memory holds one shard's
scalars, a sample of vectors, and hashes of HASHES images.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitray.consume.report.truth import TrueLabels
from vitray.dataset import Dataset, matrix_of, read_footer, read_table
from vitray.errors import CommitError
from vitray.evaluation.pictures import Ref
from vitray.storage import store_for

SAMPLE_SHARDS = 16  # whose vectors and pictures are read
SAMPLE_ROWS = 2000
SCORE_BINS = 20
TRUTH_BINS = 10
LEAST_SURE = 18
EACH_LABEL = 6
MEMBERS = 3  # shown of each group of duplicates
EXAMPLES = 4  # shown of each reason
HASHES = 2_000_000  # 48 MB


class SameBytes:
    """Groups of rows with the same encoded bytes.

    Beyond `limit` images it keeps a share of all hashes, so that groups stay complete.
    """

    def __init__(self, limit: int = HASHES) -> None:
        self.limit = limit
        self.halvings = 0  # the share is 1 / 2**halvings
        # columns: the hash's first 8 bytes, shard number, index
        self._blocks = [np.empty((0, 3), np.uint64)]

    def add(self, number: int, hashes: pa.ChunkedArray, indexes: np.ndarray) -> None:
        first = np.frombuffer(b"".join(hashes.to_pylist()), np.uint64)[::2]
        rows = np.stack(
            [first, np.full(len(first), number, np.uint64), indexes.astype(np.uint64)], axis=1
        )
        self._blocks.append(self._share(rows))
        while sum(map(len, self._blocks)) > self.limit:
            self.halvings += 1
            self._blocks = [self._share(block) for block in self._blocks]

    def groups(self, most: int) -> tuple[int, list[tuple[int, list[tuple[int, int]]]]]:
        """The number of rows that equal another one, and the `most` largest groups.

        A group is its size and its first rows, each (shard number, index).
        """
        rows = np.concatenate(self._blocks)
        rows = rows[np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))]
        _, starts, sizes = np.unique(rows[:, 0], return_index=True, return_counts=True)
        largest = [n for n in np.argsort(-sizes, kind="stable")[:most] if sizes[n] > 1]
        groups = list[tuple[int, list[tuple[int, int]]]]()
        for n in largest:
            first = rows[starts[n] : starts[n] + min(sizes[n], MEMBERS), 1:].tolist()
            groups.append((int(sizes[n]), [(int(shard), int(index)) for shard, index in first]))
        return int(sizes[sizes > 1].sum()), groups

    def _share(self, rows: np.ndarray) -> np.ndarray:
        """The rows whose hash is in the share."""
        return np.compress(rows[:, 0] % np.uint64(1 << self.halvings) == 0, rows, axis=0)


@dataclass(slots=True)
class Counts:
    """Sums over a dataset.

    scores: rows by score. truth: [bin, (rows, right ones, sum of scores)]. unknown_truth: rows
    without a true label.
    """

    shards: list[str] = field(default_factory=list)
    rows: int = 0
    errors: int = 0
    truncated: dict[str, int] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(SCORE_BINS, np.int64))
    truth: np.ndarray = field(default_factory=lambda: np.zeros((TRUTH_BINS, 3)))
    unknown_truth: int = 0
    least_sure: list[tuple[float, Ref]] = field(default_factory=list)
    by_label: dict[str, list[Ref]] = field(default_factory=dict)
    same_bytes: SameBytes = field(default_factory=SameBytes)
    sampled: list[Ref] = field(default_factory=list)
    sampled_labels: list[str] = field(default_factory=list)
    sampled_hashes: list[bytes] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def images(self) -> int:
        return self.rows + self.errors


def count(dataset: Dataset, urls: Sequence[str], truth: TrueLabels | None) -> Counts:
    """The sums over these data files. Raises CommitError for a file that cannot be read.

    truth: the true labels, by name or by id.
    """
    counts = Counts()
    positions = np.linspace(0, len(urls) - 1, min(SAMPLE_SHARDS, len(urls))).astype(int)
    sampled_urls = {urls[n] for n in positions}
    for url in urls:
        sample = math.ceil(SAMPLE_ROWS / len(sampled_urls)) if url in sampled_urls else 0
        try:
            _add(counts, dataset, url, truth, sample)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CommitError(
                f"{url} cannot be read ({error}). "
                f"`vitray validate {dataset.out}` checks every file."
            ) from error
    return counts


def _add(counts: Counts, dataset: Dataset, url: str, truth: TrueLabels | None, sample: int) -> None:
    """Add one data file. sample: how many of its vectors to keep."""
    footer = read_footer(url)
    labelled = dataset.job.labelled
    _add_errors(counts, footer.error_rows)
    if footer.truncated_at is not None:
        counts.truncated[footer.shard] = footer.truncated_at
    vector = next((v.column for v in dataset.vectors), None) if sample else None
    names = ["index", "format", "content_hash"]
    if labelled:
        names += ["label", "label_id", "score"]
    truth_column = truth.column if truth else None
    names += [name for name in (truth_column, vector) if name and name not in names]
    with store_for(url).open(url) as stream:
        table = read_table(stream, names)
    indexes = table["index"].to_numpy()
    counts.rows += len(table)
    counts.formats.update(_values(table["format"].cast(pa.string())))
    counts.same_bytes.add(len(counts.shards), table["content_hash"], indexes)
    counts.shards.append(footer.shard)
    if labelled:
        _add_labels(counts, footer.shard, table, indexes, bool(sample))
    if labelled and truth:
        _add_truth(counts, table, dataset, truth)
    if vector and len(table):
        at = np.linspace(0, len(table) - 1, min(sample, len(table))).astype(int)
        counts.sampled += [(footer.shard, int(indexes[n])) for n in at]
        counts.sampled_labels += table["label"].take(at).to_pylist() if labelled else [""] * len(at)
        counts.sampled_hashes += table["content_hash"].take(at).to_pylist()
        counts.vectors.append(matrix_of(table[vector].take(at)).astype(np.float32))


def _add_errors(counts: Counts, rows: pa.Table) -> None:
    counts.errors += len(rows)
    counts.reasons.update(_values(rows["reason"]))
    for reason in rows["reason"].unique().to_pylist():
        examples = counts.examples.setdefault(reason, [])
        first = rows.filter(pc.equal(rows["reason"], reason)).slice(0, EXAMPLES - len(examples))
        examples += first.select(["key", "uri", "message"]).to_pylist()


def _add_labels(
    counts: Counts, shard: str, table: pa.Table, indexes: np.ndarray, is_sampled: bool
) -> None:
    scores = table["score"].to_numpy()
    counts.labels.update(_values(table["label"]))
    counts.scores += np.histogram(scores, SCORE_BINS, (0, 1))[0]
    least = np.argsort(scores, kind="stable")[:LEAST_SURE]
    in_shard = [(float(scores[n]), (shard, int(indexes[n]))) for n in least]
    counts.least_sure = heapq.nsmallest(LEAST_SURE, [*counts.least_sure, *in_shard])
    if is_sampled:
        _add_examples(counts, shard, table["label"].to_pylist(), indexes)


def _add_examples(counts: Counts, shard: str, labels: list[str], indexes: np.ndarray) -> None:
    """Keep the first rows of each label: low indexes need the least of a tar to show them."""
    by_label: dict[str, list[Ref]] = {}
    for label, index in zip(labels, indexes):
        if len(refs := by_label.setdefault(label, [])) < EACH_LABEL:
            refs.append((shard, int(index)))
    for label, refs in by_label.items():
        merged = [*counts.by_label.get(label, []), *refs]
        counts.by_label[label] = sorted(merged, key=lambda ref: ref[1])[:EACH_LABEL]


def _add_truth(counts: Counts, table: pa.Table, dataset: Dataset, truth: TrueLabels) -> None:
    true_labels = [truth.label_of(value) for value in table[truth.column].to_pylist()]
    has_truth = np.array([value != "" for value in true_labels], bool)
    labels = zip(true_labels, table["label"].to_pylist(), table["label_id"].to_pylist())
    right = np.array([is_right(dataset, *row) for row in labels], bool)
    scores = table["score"].to_numpy()
    bins = np.clip((scores * TRUTH_BINS).astype(int), 0, TRUTH_BINS - 1)
    for position, values in enumerate((np.ones(len(scores)), right, scores)):
        weights = values[has_truth].astype(float)
        counts.truth[:, position] += np.bincount(bins[has_truth], weights, TRUTH_BINS)
    counts.unknown_truth += int((~has_truth).sum())


def is_right(dataset: Dataset, true_label: str, label: str, label_id: int) -> bool:
    """Whether a label is the true one, which is a name, or an id where no name is a number."""
    if true_label == label:
        return True
    has_numbers = any(name.isdecimal() for name in dataset.spec.labels)
    return true_label == str(label_id) and not has_numbers


def _values(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs."""
    return {str(item["values"]): item["counts"] for item in pc.value_counts(column).to_pylist()}
