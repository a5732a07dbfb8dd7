"""The progress of a run, as a table and as JSON lines."""

from __future__ import annotations

import io
import json
import time
from collections import deque

import pytest
from rich.console import Console

from vitray.cli.progress_view import RunView, json_line, view
from vitray.phases import Phase
from vitray.pipeline.events import FragmentSkipped, FragmentWritten
from vitray.pipeline.progress import TIMELINE_POINTS, Progress


def some_progress() -> Progress:
    progress = Progress(shards=4, images_expected=400, started=time.monotonic() - 20)
    progress.add(FragmentSkipped("a", 0, 100))
    seconds = {"read": 0.1, "decode": 2.0, "predict": 4.0, "stage": 0.2}
    progress.add(
        FragmentWritten(
            "b",
            0,
            100,
            reasons={"truncated": 3, "empty": 2},
            seconds=seconds,
            size_bytes=4_000_000,
        )
    )
    progress.shards_done, progress.shards_staged, progress.set_aside = 1, 2, 1
    progress.waiting = lambda: "3 fragments wait for decode"
    return progress


def test_json_line_has_the_figures_of_a_run() -> None:
    fields = json.loads(json_line(some_progress()))
    assert {name: fields[name] for name in ("images", "images_expected", "shards", "shards_done", "shards_set_aside", "resumed")} == {
        "images": 200, "images_expected": 400, "shards": 4, "shards_done": 1, "shards_set_aside": 1, "resumed": 100,
    }  # fmt: skip
    assert (
        fields["shards_staged"] == 2
        and fields["failed"] == {"truncated": 3, "empty": 2}
        and fields["bytes"] == 4_000_000
    )
    assert fields["seconds_by_step"] == {"read": 0.1, "decode": 2.0, "predict": 4.0, "stage": 0.2}
    assert fields["waiting"] == "3 fragments wait for decode"
    assert 4.5 < fields["images_per_s"] <= 5.0 and 38 <= fields["eta_s"] <= 42


def test_remaining_time_of_tars_is_estimated_from_their_bytes() -> None:
    progress = Progress(shards=1, bytes_expected=1_000_000, started=time.monotonic() - 20)
    assert progress.remaining_s() is None
    progress.add(FragmentSkipped("a", 0, 100))  # of which no byte was decoded
    assert progress.remaining_s() is None
    # 1,000 images, then: 800 are left, at 5 a second
    progress.add(FragmentWritten("a", 100, 200, size_bytes=100_000))
    assert progress.remaining_s() == pytest.approx(160, rel=0.01)
    progress.shards_done = 1  # a tar holds more than images
    assert progress.remaining_s() == 0


def test_view_shows_the_figures_of_a_run() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(view(some_progress()))
    text = console.file.getvalue()
    for part in (
        "1 of 4 done, 2 staged in part, 1 set aside",
        "200 of 400, 5 failed, 100 already staged", "3 truncated", "4.0 MB read",
        "40.0 ms per image", "3 fragments wait for decode", "CPU here",
    ):  # fmt: skip
        assert part in text, (part, text)


def test_recent_rate_is_of_the_last_seconds_and_the_timeline_stays_short() -> None:
    progress = Progress(shards=1, started=time.monotonic() - 1000)
    for n in range(5000):
        progress.add(FragmentWritten("a", n, n + 1))
    assert len(progress.timeline) <= TIMELINE_POINTS
    progress.recent = deque([(0.0, 0), (980.0, 4000), (995.0, 4900)])
    assert 45 < progress.recent_rate() < 55  # 1,000 images since the mark at 980 s
    assert 4.9 < progress.rate() < 5.1


def test_progress_grows_with_each_batch_before_a_fragment_is_written() -> None:
    progress = Progress(shards=1, images_expected=200, started=time.monotonic() - 10)
    assert progress.share() == 0.0 and progress.remaining_s() is None
    progress.predicted["worker 1"] = 50
    assert (progress.images_seen, progress.images, progress.share()) == (50, 0, 0.25)
    assert progress.remaining_s() == pytest.approx(30, rel=0.01)
    progress.predicted["worker 2"] = 900  # the first one died, and more was predicted again
    assert (progress.images_seen, progress.share()) == (200, 1.0)


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        (Progress(), None),
        (Progress(shards=2, bytes_expected=100), None),
        (Progress(shards=1, images_expected=100, good=40), 0.4),
        (Progress(shards=1, images_expected=100, good=40, resumed=40, predicted={"a": 10}), 0.5),
        (Progress(shards=2, bytes_expected=1000, good=10, size_bytes=100), 0.1),
        (Progress(shards=2, shards_done=1, set_aside=1), 1.0),
    ],
)
def test_share_of_the_work(progress: Progress, share: float | None) -> None:
    assert progress.share() == (share if share is None else pytest.approx(share))


def test_a_terminal_shows_the_phase_until_there_are_figures() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    run_view = RunView()
    console.print(run_view)
    assert "starting… 0 s" in console.file.getvalue()
    run_view.update(Progress(phase=Phase.OPENING_MODEL))
    console.print(run_view)
    assert "opening the model… 0 s" in console.file.getvalue()
    run_view.update(Progress(phase=Phase.COMPUTING, shards=1, images_expected=10, good=5))
    console.print(run_view)
    shown = console.file.getvalue()
    assert "50%" in shown and "5 of 10" in shown and "computing… 0 s" in shown
