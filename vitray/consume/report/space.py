"""A map of sampled vectors, and groups of near ones."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import numpy as np

from vitray.vectors import unit

NEAR = 0.99  # cosine


def on_a_plane(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """[N, D] as [N, 2] within 0 and 1, y upwards, and a sentence about the method.

    The method is UMAP where it is installed, else PCA.
    """
    if len(vectors) > 15 and find_spec("umap"):  # 15: UMAP's own number of neighbours
        umap = import_module("umap").UMAP(n_components=2, metric="cosine", random_state=0)
        points = umap.fit_transform(vectors)
        how = "UMAP by cosine: neighbours are near, distances between groups mean little."
    else:
        points, share = principal(vectors)
        how = (
            "The first two principal components, to the right and upwards, "
            f"hold {share:.0%} of the variance."
        )
    low = points.min(0)
    span = np.ptp(points, axis=0)
    return (points - low) / np.where(span > 0, span, 1), how


def principal(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """[N, D] on the first two principal components, [N, 2], and their share of the variance."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    plane = axes[:, ::-1][:, :2]
    # an axis has no sign of its own: its largest component is made positive
    plane = plane * np.sign(plane[np.abs(plane).argmax(0), range(plane.shape[1])])
    points = np.zeros((len(vectors), 2))
    points[:, : plane.shape[1]] = centred @ plane
    return points, float(values[::-1][:2].sum() / max(values.sum(), 1e-30))


def near_groups(vectors: np.ndarray) -> list[list[int]]:
    """Groups of rows of [N, D], the largest first; a row is in one group at most.

    The cosine of each row to the first row of its group is NEAR or more.
    """
    directions = unit(vectors)
    near = directions @ directions.T >= NEAR
    free = np.ones(len(vectors), bool)
    groups = []
    for n in range(len(vectors)):
        members = np.flatnonzero(near[n] & free)
        if free[n] and len(members) > 1:
            free[members] = False
            groups.append([int(m) for m in members])
    return sorted(groups, key=lambda group: (-len(group), group))
