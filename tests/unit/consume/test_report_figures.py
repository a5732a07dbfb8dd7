"""The figures of the report: planes, groups of duplicates, axes and intervals."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vitray.consume.report.counts import SameBytes
from vitray.consume.report.page import wilson
from vitray.consume.report.space import near_groups, on_a_plane, principal
from vitray.html import axis


def test_the_plane_is_that_of_the_singular_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32) * np.arange(1, 17)
    points, share = principal(vectors)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(
        np.abs(points), np.abs(u[:, :2] * s[:2]), atol=1e-2
    ) and share == pytest.approx((s**2)[:2].sum() / (s**2).sum())
    assert principal(np.ones((5, 1)))[0].shape == (5, 2)
    (tmp_path / "umap.py").write_text(
        "class UMAP:\n    def __init__(self, **options): pass\n    def fit_transform(self, x): "
        "return x[:, 3:5]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points, how = on_a_plane(vectors)
    assert (
        how.startswith("UMAP") and np.allclose(points.min(0), 0) and np.allclose(points.max(0), 1)
    )
    assert np.corrcoef(points[:, 0], vectors[:, 3])[0, 1] == pytest.approx(1)
    del sys.modules["umap"]  # monkeypatch would bring it back for later tests


def test_near_groups_are_around_their_first() -> None:
    angles = np.deg2rad([0, 90, 5, 95, 13, 180, 91])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.arange(1, 8)[:, None]
    assert near_groups(vectors) == [
        [1, 3, 6],
        [0, 2],
    ]  # cos 8.1 degrees is 0.99: 13 is near 5, not 0
    assert near_groups(np.zeros((3, 4))) == []


def test_more_images_than_fit_leave_whole_groups_of_a_share() -> None:
    import pyarrow as pa

    rng, same = np.random.default_rng(2), SameBytes(limit=1000)
    hashes = [rng.bytes(16) for _ in range(5000)]
    for number in range(2):
        same.add(number, pa.chunked_array([pa.array(hashes, pa.binary(16))]), np.arange(5000))
    rows, groups = same.groups(10_000)
    assert same.halvings == 4 and rows == 2 * len(groups) and 400 < len(groups) * 16 / 10 < 600
    assert all(
        size == 2 and [s for s, _ in first] == [0, 1] and first[0][1] == first[1][1]
        for size, first in groups
    )


def test_axes_are_round_and_intervals_are_wilsons() -> None:
    assert [axis(top)[-1] for top in (560, 3, 0, 1000, 7)] == [600, 3, 1, 1000, 8]
    assert all(
        top <= axis(top)[-1] <= 2 * top and len(axis(top)) <= 6
        for top in np.geomspace(0.01, 1e9, 100)
    )
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)
