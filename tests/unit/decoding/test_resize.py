"""resize equals Pillow in every bit, whatever the sizes; without Numba, or with no folder for what
it compiles, too.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from support.resizing import FILTERS, by_pillow
from vitray.decoding.resize import resize

SIDE = st.one_of(st.integers(1, 40), st.integers(1, 700))


@settings(max_examples=300, deadline=None)
@given(
    SIDE,
    SIDE,
    st.tuples(SIDE, SIDE),
    st.sampled_from(FILTERS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_every_bit_is_that_of_pillow(
    rows: int, columns: int, size: tuple[int, int], resample: int, extreme: bool, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)
    if extreme:  # what overflows, and what must be clipped, does so here
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    assert np.array_equal(resize(pixels, size, resample), by_pillow(pixels, size, resample))
