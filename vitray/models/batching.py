"""What every engine does around its forward pass: check pixels, form batches, gather predictions.

Few batch sizes and little padding: a compiled model sees few sizes and computes few rows in vain.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vitray.errors import ModelError
from vitray.models.types import Predictions
from vitray.schema import ModelOutputs, ModelSpec

RUNGS, SMALLEST = 4, 8  # each size costs a compilation at every start
PADDING = 0.02  # share of the images in one call: a prototype padded 22% for tails of small shards


def ladder(batch: int) -> tuple[int, ...]:
    """The batch sizes worth compiling, largest first: the batch and its halves."""
    sizes = [batch >> n for n in range(RUNGS)]
    return tuple(size for size in sizes if size == batch or size >= SMALLEST)


def cut(images: int, sizes: tuple[int, ...], padding: float) -> list[int]:
    """Batch sizes, each of `sizes` (largest first), that hold the images in order.

    Only the last batch may be padded, by at most the share `padding` of all images. It may also be
    smaller than every size.
    """
    batches: list[int] = []
    remaining = images
    for size in sizes:
        batches += [size] * (remaining // size)
        remaining %= size
        if remaining and size - remaining <= images * padding:
            return [*batches, size]
    return [*batches, remaining] if remaining else batches


def share(images: int, batch: int, workers: int) -> list[int]:
    """Batch sizes of at most `batch`, nearly equal, and the same number for every worker."""
    batches = min(images, -(-images // (batch * workers)) * workers)
    return [images // batches + (n < images % batches) for n in range(batches)]


def check_pixels(spec: ModelSpec, pixels: Any) -> None:
    """Raise ModelError unless pixels are uint8 [N, H, W, 3] of the checkpoint's size."""
    height, width = spec.pixels.shape
    kind = str(pixels.dtype).removeprefix("torch.")
    if kind != "uint8" or tuple(pixels.shape[1:]) != (height, width, 3):
        raise ModelError(
            f"{spec.model} takes pixels as uint8 [N, {height}, {width}, 3], not {kind} "
            f"{list(pixels.shape)}."
        )


def gather(spec: ModelSpec, outputs: ModelOutputs, columns: list[np.ndarray]) -> Predictions:
    """Predictions of the columns scores and ids [N, k], then one [N, D] for each vector.

    columns: empty where there was no image. Raises ModelError for values that are not finite.
    """
    if not columns:  # shapes and types without a forward pass
        columns = [np.empty((0, outputs.top_k), np.float32), np.empty((0, outputs.top_k), np.int64)]
        columns += [np.empty((0, vector.dimension), vector.dtype) for vector in outputs.vectors]
    scores, ids = columns[:2]
    vectors = dict(zip([vector.column for vector in outputs.vectors], columns[2:]))
    for name, values in {"score": scores, **vectors}.items():
        if not np.isfinite(values).all():
            raise ModelError(
                f"{spec.model}: `{name}` is not finite in precision {spec.precision}. "
                "Set precision: fp32 (or bf16), and dtype: float32 if the embedding is float16."
            )
    if outputs.top_k == 0:
        return Predictions(None, None, vectors)
    return Predictions(ids.astype(np.int32), scores, vectors)
