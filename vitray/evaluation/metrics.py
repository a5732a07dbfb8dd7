"""Pure functions that compare labels, vectors and scores: every figure has its one definition here.

Used by reports, training and export. None reads a file or runs a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from vitray.errors import count
from vitray.vectors import TINY


def accuracy(labels: Sequence[object] | np.ndarray, truth: Sequence[object] | np.ndarray) -> float:
    """Share of labels that equal the truth; 0 for no labels."""
    if len(labels) != len(truth):
        raise ValueError(f"{count(len(labels), 'label')} and {count(len(truth), 'true label')}")
    if len(labels) == 0:
        return 0.0
    if isinstance(labels, np.ndarray) and isinstance(truth, np.ndarray):
        return float(np.mean(np.asarray(labels == truth)))
    return float(sum(label == true for label, true in zip(labels, truth)) / len(labels))


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [C, C]: images by true class (row) and predicted class (column)."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return counts


def commonest_mistakes(
    truth: np.ndarray, predicted: np.ndarray, most: int
) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of wrong predictions, the commonest first."""
    is_wrong = truth != predicted
    pairs = Counter(zip(truth[is_wrong].tolist(), predicted[is_wrong].tolist()))
    return [(true, label, images) for (true, label), images in pairs.most_common(most)]


def mean_overlap(one: Iterable[Iterable[int]], two: Iterable[Iterable[int]], k: int) -> float:
    """Mean share of k that two lists of ids have in common, over the rows of both."""
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(one, two)]))


def largest_relative_error(expected: np.ndarray, computed: np.ndarray) -> float:
    """The largest |computed - expected| / |expected| of a row; both float [N, D]."""
    lengths = np.maximum(np.linalg.norm(expected, axis=1), TINY)
    return float((np.linalg.norm(computed - expected, axis=1) / lengths).max())
