"""What every engine does around its forward pass: what goes in is checked, what comes out becomes
Predictions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitray.errors import ModelError
from vitray.models import Predictions
from vitray.schema import ModelSpec, VectorColumn


def check_pixels(spec: ModelSpec, pixels: Any) -> None:
    """Raises ModelError unless pixels are uint8 [N, H, W, 3] of the checkpoint's size."""
    height, width = spec.pixels.shape
    kind = str(pixels.dtype).removeprefix("torch.")
    if kind != "uint8" or tuple(pixels.shape[1:]) != (height, width, 3):
        raise ModelError(
            f"{spec.model} takes pixels as uint8 [N, {height}, {width}, 3], not {kind} "
            f"{list(pixels.shape)}."
        )


def best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of scores [N, C], best first, and their ids, both [N, k]; of equal ones the lower
    id.
    """
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, 1), ids


def gather(
    spec: ModelSpec, vectors: list[VectorColumn], k: int, columns: list[np.ndarray]
) -> Predictions:
    """Predictions of the columns scores and ids [N, k], then one [N, D] a vector; of no columns
    where there was no image.

    Raises ModelError for what is not finite.
    """
    if not columns:  # shapes and types without a forward pass
        columns = [np.empty((0, k), np.float32), np.empty((0, k), np.int64)]
        columns += [np.empty((0, v.dimension), v.dtype) for v in vectors]
    scores, ids, *found = columns
    for name, values in [("score", scores)] + [(v.column, x) for v, x in zip(vectors, found)]:
        if not np.isfinite(values).all():
            raise ModelError(
                f"{spec.model}: `{name}` is not finite in precision {spec.precision}. "
                "Set precision: fp32 (or bf16), and dtype: float32 if the embedding is float16."
            )
    named = {column.column: values for column, values in zip(vectors, found)}
    return Predictions(ids.astype(np.int32) if k else None, scores if k else None, named)
