"""Arithmetic over rows of vectors and of scores, defined once for all packages. numpy only."""

from __future__ import annotations

import numpy as np

TINY = 1e-30  # instead of a length of 0: a zero vector has cosine 0, and errors stay finite


def unit(vectors: np.ndarray) -> np.ndarray:
    """[N, D] with every row at length 1; a row of zeros stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.maximum(lengths, 1e-12)
    return scaled


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """float64 [N]: the cosine of each row of [N, D] with the same row of the other array."""
    one, two = one.astype(np.float64), two.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return np.asarray((one * two).sum(1) / np.maximum(lengths, TINY))


def top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of scores [N, C] and their ids, both [N, k], best first; ties: lower id first."""
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids
