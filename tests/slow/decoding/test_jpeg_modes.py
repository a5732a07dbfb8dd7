"""JPEG decoding in the modes `exact`, `fast` and `draft`, compared with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from support.encoded_images import (
    DATA,
    PHOTOS,
    SIZES,
    encode,
    in_mode,
    large,
    photo,
    processors,
    spec,
)
from vitray.schema import DecodeSpec


@pytest.mark.parametrize("case", range(len(processors())))
def test_fast_is_a_level_off_here_and_there(case: int) -> None:
    wanted = processors()[case][2]
    files = [(DATA / photo).read_bytes() for photo in PHOTOS]
    files += [encode(photo(*size), "PNG") for size in SIZES]
    files += [
        encode(photo(*size), "JPEG", quality=q)
        for q in (60, 90)
        for size in ((640, 423), (300, 640), (500, 375))
    ]
    exact = in_mode("exact", files, wanted)
    apart = np.abs(in_mode("fast", files, wanted) - exact)
    assert apart.mean() < 0.01
    # torch's weights have 16 bits, Pillow's 24, which bicubic overshoot may double
    assert apart.max() <= (2 if wanted.pixels.resample == 3 else 1)
    assert (apart > 1).mean() < 1e-5
    if wanted.pixels.resample == 1 or wanted.pixels.size is None:  # what torch does not do
        assert apart.max() == 0


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    "wanted",
    [
        spec((224, 224), None, 2),
        spec((256,), (224, 224), 3),
        spec((300, 200), None, 3),
        spec((96, 96), None, 1),
    ],
)
def test_draft_of_a_large_jpeg_is_near(wanted: DecodeSpec, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = [
        encode(large(*size), "JPEG", quality=90, exif=exif) for size in ((2400, 1800), (1800, 2400))
    ]
    apart = np.abs(in_mode("draft", files, wanted) - in_mode("exact", files, wanted))
    assert 0.05 < apart.mean() < 0.75
    assert apart.max() <= 24
