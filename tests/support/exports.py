"""Exported files as other tools read them."""

from __future__ import annotations

from pathlib import Path

from factories import embedded
from factories.embedded import HOSTILE, noise
from vitray.dataset import Dataset


def made(folder: Path, dtype: str = "float32", **more: object) -> Dataset:
    """Two shards, one of them with every hostile key."""
    return embedded.make(
        folder, [noise(len(HOSTILE), seed=1, keys=HOSTILE), noise(30, seed=2)], dtype, **more
    )
