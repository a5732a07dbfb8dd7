"""Pillow's resize, to compare with."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vitray.decoding.resize import Pixels

FILTERS = list(Image.Resampling)


def by_pillow(pixels: Pixels, size: tuple[int, int], resample: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize(size, resample))
