"""Decoded pixels equal those of Hugging Face and Pillow, also of odd images."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from support.encoded_images import DATA, PHOTOS, SIZES, encode, items, photo, processors
from vitray.decoding.decode import decode


@pytest.mark.parametrize("case", range(len(processors())))
def test_pixels_equal_hugging_face_bit_for_bit(case: int) -> None:
    from importlib import import_module

    from transformers.image_utils import load_image

    name, options, wanted = processors()[case]
    module = import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    processor = next(getattr(module, n) for n in module.__all__)(
        **options, do_rescale=False, do_normalize=False
    )
    files = [(DATA / photo).read_bytes() for photo in PHOTOS]
    files += [encode(photo(*size), "PNG") for size in SIZES]
    files += [encode(photo(640, 423), "JPEG", quality=q, progressive=q > 80) for q in (60, 90)]
    pixels, outcomes = decode(items(*files), wanted)
    assert [outcome.reason for outcome in outcomes] == [None] * len(files)
    for data, ours in zip(files, pixels):
        theirs = processor(load_image(Image.open(io.BytesIO(data)))).pixel_values[0]
        assert np.array_equal(ours, np.moveaxis(theirs, 0, -1))
