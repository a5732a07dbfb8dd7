"""The progress of a run: a table for a terminal, or a JSON object per line."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta

import psutil
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitray.clock import utc_now
from vitray.pipeline import Progress

GPU_EVERY_S = 5.0


def json_line(progress: Progress) -> str:
    """The progress of a run as one JSON object, for programs that read its log."""
    left_s = progress.remaining_s()
    fields = {
        "at": utc_now(),
        "images": progress.images,
        "images_expected": progress.images_expected,
        "images_per_s": round(progress.rate(), 2),
        "images_per_s_now": round(progress.recent_rate(), 2),
        "eta_s": None if left_s is None else round(left_s),
        "shards": progress.shards,
        "shards_done": progress.shards_done,
        "shards_staged": progress.shards_staged,
        "shards_set_aside": progress.set_aside,
        "resumed": progress.resumed,
        "failed": progress.reasons,
        "bytes": progress.size_bytes,
        "seconds_by_step": {step: round(seconds, 1) for step, seconds in progress.seconds.items()},
        "waiting": progress.waiting(),
        "cpu": round(psutil.cpu_percent() / 100, 3),
        "gpu": _gpu_shares(),
    }
    return json.dumps(fields)


def view(progress: Progress) -> Table:
    """The progress of a run as a table, for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_row("", _bar(progress))
    for name, text in _view_rows(progress):
        table.add_row(name, Text(text))
    return table


def _bar(progress: Progress) -> ProgressBar:
    if progress.images_expected:
        return ProgressBar(total=progress.images_expected, completed=progress.images)
    return ProgressBar(total=progress.shards, completed=progress.shards_done)


def _view_rows(progress: Progress) -> list[tuple[str, str]]:
    expected = f" of {progress.images_expected:,}" if progress.images_expected else ""
    left_s = progress.remaining_s()
    computed = max(1, progress.images - progress.resumed)
    return [
        (
            "shards",
            f"{progress.shards_done:,} of {progress.shards:,} done, {progress.shards_staged:,} "
            f"staged in part, {progress.set_aside} set aside",
        ),
        (
            "images",
            f"{progress.images:,}{expected}, {progress.errors:,} failed, "
            f"{progress.resumed:,} already staged",
        ),
        (
            "images/s",
            f"{progress.recent_rate():,.1f} now, {progress.rate():,.1f} on average, "
            f"{decimal(progress.size_bytes)} read",
        ),
        ("ETA", "not known yet" if left_s is None else str(timedelta(seconds=round(left_s)))),
        *(("failed", f"{rows:,} {reason}") for reason, rows in sorted(progress.reasons.items())),
        *(
            (step, f"{1000 * seconds / computed:,.1f} ms per image, {seconds:,.0f} s in total")
            for step, seconds in progress.seconds.items()
        ),
        ("waiting", progress.waiting()),
        ("CPU here", f"{psutil.cpu_percent():.0f}%"),
        *(
            (f"GPU {number} here", f"{100 * share:.0f}%")
            for number, share in enumerate(_gpu_shares())
        ),
    ]


@dataclass(slots=True)
class GpuReading:
    """The last answer of nvidia-smi. taken: by time.monotonic(); inf: do not ask again."""

    taken: float = -math.inf
    shares: list[float] = field(default_factory=list)


_last_reading = GpuReading()


def _gpu_shares() -> list[float]:
    """The share of time in which each NVIDIA GPU of this machine worked.

    Asks nvidia-smi once in GPU_EVERY_S, and never again after it has failed.
    """
    if time.monotonic() - _last_reading.taken < GPU_EVERY_S:
        return _last_reading.shares
    _last_reading.taken = math.inf
    _last_reading.shares = []
    if command := shutil.which("nvidia-smi"):
        argv = [command, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            answer = subprocess.run(argv, capture_output=True, timeout=5, check=True).stdout
            _last_reading.shares = [int(line) / 100 for line in answer.split()]
            _last_reading.taken = time.monotonic()
    return _last_reading.shares
