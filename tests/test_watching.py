"""What is seen of a run: the view, the JSON lines, the numbers in both, and what Prometheus is
told.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
from rich.console import Console
from shards import pictures, put_tars

from vitray.operations.watching import json_line, view
from vitray.pipeline.progress import TIMELINE_POINTS, Progress
from vitray.schema import ShardEvent

VITRAY = [sys.executable, "-m", "vitray"]


def some_progress() -> Progress:
    progress = Progress(shards=4, images_expected=400, started=time.monotonic() - 20)
    progress.add(ShardEvent("staged", "a", 0, 100))
    seconds = {"read": 0.1, "decode": 2.0, "predict": 4.0, "stage": 0.2}
    progress.add(
        ShardEvent(
            "fragment",
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


def test_the_json_line_has_the_numbers() -> None:
    told = json.loads(json_line(some_progress()))
    assert {name: told[name] for name in ("images", "images_expected", "shards", "shards_done", "shards_set_aside", "resumed")} == {
        "images": 200, "images_expected": 400, "shards": 4, "shards_done": 1, "shards_set_aside": 1, "resumed": 100,
    }  # fmt: skip
    assert (
        told["shards_staged"] == 2
        and told["failed"] == {"truncated": 3, "empty": 2}
        and told["bytes"] == 4_000_000
    )
    assert told["seconds_by_step"] == {"read": 0.1, "decode": 2.0, "predict": 4.0, "stage": 0.2}
    assert told["waiting"] == "3 fragments wait for decode"
    assert 4.5 < told["images_per_s"] <= 5.0 and 38 <= told["eta_s"] <= 42


def test_the_time_left_of_tars_comes_from_their_bytes() -> None:
    progress = Progress(shards=1, bytes_expected=1_000_000, started=time.monotonic() - 20)
    assert progress.remaining_s() is None
    progress.add(ShardEvent("staged", "a", 0, 100))  # of which no byte was decoded
    assert progress.remaining_s() is None
    progress.add(
        ShardEvent("fragment", "a", 100, 200, size_bytes=100_000)
    )  # 1,000 images, then: 800 are left, at 5 a second
    assert progress.remaining_s() == pytest.approx(160, rel=0.01)
    progress.shards_done = 1  # a tar holds more than images
    assert progress.remaining_s() == 0


def test_the_view_has_them_too() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(view(some_progress()))
    text = console.file.getvalue()
    for part in (
        "1 of 4 done, 2 staged in part, 1 set "
        "aside", "200 of 400, 5 failed, 100 found staged", "3 truncated", "4.0 MB read",
        "40.0 ms an image", "3 fragments wait for decode", "CPU here",
    ):  # fmt: skip
        assert part in text, (part, text)


def test_the_rate_now_is_of_the_last_seconds_and_the_timeline_stays_short() -> None:
    progress = Progress(shards=1, started=time.monotonic() - 1000)
    for n in range(5000):
        progress.add(ShardEvent("fragment", "a", n, n + 1))
    assert len(progress.timeline) <= TIMELINE_POINTS
    progress.recent = deque([(0.0, 0), (980.0, 4000), (995.0, 4900)])
    assert 45 < progress.recent_rate() < 55  # 1,000 images since the mark at 980 s
    assert 4.9 < progress.rate() < 5.1


def test_without_a_terminal_a_run_tells_json_lines_and_warnings_as_asked(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(60), 2, tmp_path)
    argv = [
        *VITRAY,
        "--log-format",
        "json",
        "run",
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--out",
        f"{tmp_path}/out",
    ]
    done = subprocess.run(
        [*argv, "--set", "engine=auto"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    told = [line for line in lines if "images" in line]
    assert told[-1]["shards_done"] == 2 and told[-1]["images"] == 60 and len(told) <= 3
    assert all(
        {"level", "logger", "message"} <= line.keys() for line in lines if "images" not in line
    )


def test_on_a_terminal_a_run_draws_a_view_and_gives_the_cursor_back(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(60), 2, tmp_path)
    argv = [
        *VITRAY,
        "run",
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--set",
        "engine=torch",
        "--out",
        f"{tmp_path}/out",
    ]
    mine, theirs = pty.openpty()
    with subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(mine, 65536)
            except OSError:  # the other side was closed
                break
        assert process.wait(240) == 0
    os.close(mine)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert "2 of 2 done, 0 staged in part, 0 set aside" in text and "60" in text
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
