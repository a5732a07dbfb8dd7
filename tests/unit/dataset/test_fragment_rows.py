"""How many images an `auto` fragment has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitray.dataset.resolve import FRAGMENT_BYTES, auto_fragment_rows
from vitray.models.free import free_spec


@pytest.mark.parametrize(
    ("pixels", "batch_size", "expected"),
    [
        (224, 256, 1024),
        (384, 256, 361),
        (518, 256, 198),
        (224, 16, 64),
        (224, 8, 64),
        (518, 16, 64),
        (2048, 256, 64),
    ],
)
def test_a_fragment_has_four_batches_within_its_bytes(
    pixels: int, batch_size: int, expected: int
) -> None:
    spec = free_spec(0)
    sized = replace(spec.pixels, size=(pixels, pixels))
    rows = auto_fragment_rows(replace(spec, pixels=sized, batch_size=batch_size))
    assert rows == expected
    assert rows == 64 or rows * pixels * pixels * 3 <= FRAGMENT_BYTES
