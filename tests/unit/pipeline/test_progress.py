"""The figures of a run in progress."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from vitray.pipeline.events import FragmentSkipped, FragmentWritten
from vitray.pipeline.progress import TIMELINE_POINTS, Progress


def test_the_timeline_of_a_long_run_is_as_fine_at_its_start_as_at_its_end() -> None:
    progress = Progress()
    for second in range(1, 20_001):
        progress.started = time.monotonic() - second
        progress.add(FragmentWritten("s", 0, 4 if second <= 19_980 else 1))
    seconds = [at for at, _ in progress.timeline]
    assert (
        TIMELINE_POINTS / 2 <= len(seconds) <= TIMELINE_POINTS
        and seconds[0] < 101
        and seconds[-1] > 19_900
    )
    assert {round(later - at) for at, later in pairwise(seconds)} == {64}
    assert [images for _, images in progress.timeline[:3]] == [256, 512, 768]
    assert progress.recent_rate() == pytest.approx(1.0, abs=0.01) and len(progress.recent) <= 12


def test_fragments_are_counted_by_what_they_are() -> None:
    progress = Progress()
    progress.add(FragmentSkipped("a", 0, 10, reasons={"empty": 2}))
    progress.add(
        FragmentWritten(
            "a",
            10,
            16,
            reasons={"empty": 1, "truncated": 1},
            seconds={"read": 0.5, "decode": 1.0},
            size_bytes=700,
            copied_bytes=90,
        )
    )
    progress.add(FragmentWritten("b", 0, 1, seconds={"read": 0.25}, size_bytes=7, copied_bytes=9))
    assert (progress.images, progress.good, progress.errors) == (17, 13, 4)
    assert (progress.resumed, progress.computed) == (10, 7)
    assert progress.reasons == {"empty": 3, "truncated": 1}
    assert progress.seconds == {"read": 0.75, "decode": 1.0}
    assert (progress.size_bytes, progress.copied_bytes) == (707, 99)
