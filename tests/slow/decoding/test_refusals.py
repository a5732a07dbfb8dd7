"""Bytes that are no image, or too much of one, become error rows with their reason."""

from __future__ import annotations

from support.encoded_images import items, poison, spec
from vitray.decoding.decode import decode, limits_of


def test_an_image_has_five_cpu_seconds_and_more_only_under_a_higher_pixel_cap() -> None:
    _, outcomes = decode(items(b"a", b"loop"), spec(max_pixels=1000), poison)
    assert (outcomes[1].reason, outcomes[1].message) == (
        "time_limit",
        "the decoder took more than 5 s of CPU",
    )
    assert (
        limits_of(spec(max_pixels=50_000_000)).cpu_s == 5
        and limits_of(spec(max_pixels=200_000_000)).cpu_s == 20
    )
