"""Pillow's resize of RGB pixels, bit for bit, in less than half of its time.

Pillow weighs a pixel's neighbours in integers with 22 bits behind the point, in one direction, rounds to bytes, then does so in the
other. Numba compiles the same sums for this machine's vector units. Source: Resample.c and Image.resize of Pillow 13.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Passes = Callable[[Pixels, Any, Pixels], None]  # source, weights, result

_BITS = 22
_ROWS = 32  # what the pass across turns at a time: stays in the nearest cache


def resize(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """uint8 [H, W, 3], contiguous, as uint8 [height, width, 3] for `size` (width, height). What Numba is not here for, Pillow does."""
    kernel, passes = _KERNELS.get(resample), _compiled()
    if kernel is None or passes is None:
        return np.asarray(Image.fromarray(pixels).resize(size, resample))
    (rows, columns, _), (width, height) = pixels.shape, size
    down, across = passes
    for axis in (0, 1) if height_first(pixels.shape, size) else (1, 0):
        if axis and width != columns:
            wide = np.empty((len(pixels), width, 3), np.uint8)
            across(pixels, _weights(columns, width, *kernel), wide)
            pixels = wide
        elif not axis and height != rows:
            low = np.empty((height, pixels.shape[1], 3), np.uint8)
            down(pixels.reshape(rows, -1), _weights(rows, height, *kernel), low.reshape(height, -1))
            pixels = low
    return pixels


def height_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Pillow begins with the direction that leaves less to do for the other."""
    return shape[0] - size[1] > max(0, 2 * (shape[1] - size[0]))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x < 1, 1 - x, 0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


_KERNELS = {int(Image.Resampling.BILINEAR): (_triangle, 1.0), int(Image.Resampling.BICUBIC): (_cubic, 2.0)}


@lru_cache(64)
def _weights(
    size: int, result: int, kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]], reach: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Of each pixel of the result: its first neighbour, how many it has, and what they weigh."""
    scale = size / result
    stretch = max(scale, 1.0)
    centre = (np.arange(result) + 0.5) * scale
    first = np.maximum(0, (centre - reach * stretch + 0.5).astype(np.int64))
    count = np.minimum(size, (centre + reach * stretch + 0.5).astype(np.int64)) - first
    step = np.arange(math.ceil(reach * stretch) * 2 + 1)
    weights = kernel(np.abs((step + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)))
    weights[step >= count[:, None]] = 0
    total = weights.cumsum(axis=1)[:, -1:]  # one by one, as Pillow: a pairwise sum differs in the last bit
    weights = np.divide(weights, total, out=weights, where=total != 0) * (1 << _BITS)
    return first, count, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


@cache
def _compiled() -> tuple[Passes, Passes] | None:
    """The pass down and the pass across; None without Numba."""
    try:
        import numba
    except ImportError:  # also what it raises beside a NumPy that is newer than it knows
        return None
    half, low, high = np.int32(1 << (_BITS - 1)), np.int32(0), np.int32(255)

    def down(source: Pixels, weights: Any, result: Pixels) -> None:
        first, count, weight = weights
        sums = np.empty(source.shape[1], np.int32)
        for y in range(len(result)):
            sums[:] = half
            for n in range(count[y]):
                row, w = source[first[y] + n], weight[y, n]
                for x in range(len(sums)):
                    sums[x] += np.int32(row[x]) * w
            line = result[y]
            for x in range(len(sums)):
                line[x] = np.uint8(min(max(sums[x] >> _BITS, low), high))

    down = _jit(numba, down)

    def across(source: Pixels, weights: Any, result: Pixels) -> None:
        height, width, _ = source.shape
        turned = np.zeros((width, 3 * _ROWS), np.uint8)
        done = np.empty((result.shape[1], 3 * _ROWS), np.uint8)
        for top in range(0, height, _ROWS):
            rows = min(_ROWS, height - top)
            for y in range(rows):
                line = source[top + y]
                for x in range(width):
                    for c in range(3):
                        turned[x, 3 * y + c] = line[x, c]
            down(turned, weights, done)
            for y in range(rows):
                line = result[top + y]
                for x in range(result.shape[1]):
                    for c in range(3):
                        line[x, c] = done[x, 3 * y + c]

    return down, _jit(numba, across)


def _jit(numba: Any, function: Any) -> Any:
    try:
        return numba.njit(function, cache=True, error_model="numpy", nogil=True)
    except RuntimeError:  # no folder may be written: compiled in each process
        return numba.njit(function, error_model="numpy", nogil=True)
