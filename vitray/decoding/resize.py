"""Pillow's resize of RGB pixels, bit for bit, in less than half of its time.

Pillow weights a pixel's neighbours in integers with 22 fractional bits, in one direction. It rounds
to bytes, then does the same in the other direction. Numba compiles the same sums for this machine's
vector units. Source: Resample.c and Image.resize of Pillow 13.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitray.errors import one_line
from vitray.schema import TORCH_FILTERS

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Passes = Callable[[Pixels, Any, Pixels], None]  # source, weights, result

_BITS = 22
_first_use = threading.Lock()
_compiled_passes: list[tuple[Passes, Passes] | None] = []  # empty until the first use
_down: Any = None  # compiled, for _passes
_ROWS = 32  # what the pass across turns at a time: stays in the nearest cache


def resize(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """uint8 [H, W, 3] as uint8 [height, width, 3], for `size` (width, height).

    Pillow does it where Numba is missing, and for filters that are not compiled here.
    """
    kernel, passes = _KERNELS.get(resample), _compiled()
    if kernel is None or passes is None:
        return _by_pillow(pixels, size, resample)
    return _resized(np.require(pixels, np.uint8, ("C", "W")), size, kernel, passes)


def _by_pillow(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, resample))


def _resized(
    pixels: Pixels, size: tuple[int, int], kernel: tuple[Any, float], passes: tuple[Passes, Passes]
) -> Pixels:
    rows, columns, _ = pixels.shape
    width, height = size
    down, across = passes
    for axis in (0, 1) if _height_first(pixels.shape, size) else (1, 0):
        if axis and width != columns:
            wide = np.empty((len(pixels), width, 3), np.uint8)
            across(pixels, _weights(columns, width, *kernel), wide)
            pixels = wide
        elif not axis and height != rows:
            low = np.empty((height, pixels.shape[1], 3), np.uint8)
            down(pixels.reshape(rows, -1), _weights(rows, height, *kernel), low.reshape(height, -1))
            pixels = low
    return pixels


def resize_fast(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    """Pillow's resize with some pixels a level off, and several times faster.

    Pillow does what torch would do differently.
    """
    width, height = size
    rows, columns, _ = pixels.shape
    mode = TORCH_FILTERS.get(resample)
    # when enlarging, their bicubics are two levels apart
    if mode is None or width > columns or height > rows:
        return _by_pillow(pixels, size, resample)
    import torch

    shrink = partial(torch.nn.functional.interpolate, mode=mode, antialias=True)
    # one image, channels last: the layout for which torch's kernel is fast
    batch = torch.from_numpy(pixels).view(1, rows, columns, 3).permute(0, 3, 1, 2)
    if _height_first(pixels.shape, size):
        batch = shrink(batch, (height, columns))
    return np.asarray(shrink(batch, (height, width))[0].permute(1, 2, 0))


def _height_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether Pillow resizes the height first: the direction that saves more work in the other."""
    return shape[0] - size[1] > max(0, 2 * (shape[1] - size[0]))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x < 1, 1 - x, 0)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


_KERNELS = {
    int(Image.Resampling.BILINEAR): (_triangle, 1.0),
    int(Image.Resampling.BICUBIC): (_cubic, 2.0),
}


@lru_cache(64)
def _weights(
    size: int,
    result: int,
    kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    reach: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """For each pixel of the result: its first neighbour, their number, and their weights."""
    scale = size / result
    stretch = max(scale, 1.0)
    centre = (np.arange(result) + 0.5) * scale
    first = np.maximum(0, (centre - reach * stretch + 0.5).astype(np.int64))
    count = np.minimum(size, (centre + reach * stretch + 0.5).astype(np.int64)) - first
    step = np.arange(math.ceil(reach * stretch) * 2 + 1)
    weights = kernel(np.abs((step + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch)))
    weights[step >= count[:, None]] = 0
    # one by one, as Pillow: a pairwise sum differs in the last bit
    total = weights.cumsum(axis=1)[:, -1:]
    weights = np.divide(weights, total, out=weights, where=total != 0) * (1 << _BITS)
    return first, count, np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def compiled() -> bool:
    """Whether Numba resizes here; the first call compiles.

    Call it before threads start: Numba's first use and an import in another thread disturb each
    other.
    """
    return _compiled() is not None


def _compiled() -> tuple[Passes, Passes] | None:
    # no lock after that: one held by another thread at a fork would be held in the child for ever
    if not _compiled_passes:
        with _first_use:
            if not _compiled_passes:
                _compiled_passes.append(_compile())
    return _compiled_passes[0]


def _compile() -> tuple[Passes, Passes] | None:
    """The pass down and the pass across, checked against Pillow; None if Numba does not work."""
    try:
        passes = _passes(import_module("numba"))
    except Exception as error:
        # ImportError, also with a NumPy that is too new for it, or any error of its compiler
        if not isinstance(error, ModuleNotFoundError):
            log.warning(
                "Numba cannot be used here (%s): Pillow resizes, with the same bits, more slowly",
                one_line(error),
            )
        return None
    sample = np.arange(60 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 40, 3)
    is_equal = all(
        np.array_equal(_resized(sample, size, kernel, passes), _by_pillow(sample, size, number))
        for number, kernel in _KERNELS.items()
        for size in ((9, 50), (50, 9))
    )
    if not is_equal:
        log.warning("this Numba and this Pillow resize differently: Pillow does it, more slowly")
    return passes if is_equal else None


def _passes(numba: Any) -> tuple[Passes, Passes]:
    weights = "Tuple((int64[::1], int64[::1], int32[:,::1]))"
    half = np.int32(1 << (_BITS - 1))
    low = np.int32(0)
    high = np.int32(255)

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

    # A global of the module: the name of a function's cache includes what it closes over, and a
    # compiled function differs in each process.
    global _down
    _down = _jit(numba, f"void(uint8[:,::1], {weights}, uint8[:,::1])", down)

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
            _down(turned, weights, done)
            for y in range(rows):
                line = result[top + y]
                for x in range(result.shape[1]):
                    for c in range(3):
                        line[x, c] = done[x, 3 * y + c]

    return _down, _jit(numba, f"void(uint8[:,:,::1], {weights}, uint8[:,:,::1])", across)


def _jit(numba: Any, signature: str, function: Any) -> Any:
    """The function, compiled now for one signature, so that a resize compiles nothing."""
    try:
        return numba.njit(signature, cache=True, error_model="numpy", nogil=True)(function)
    except Exception:  # the cache is damaged, full or read-only: compile in each process
        return numba.njit(signature, error_model="numpy", nogil=True)(function)
