"""The progress of a run: a table for a terminal, or a JSON object per line."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from vitray.cli.json_output import json_text
from vitray.clock import utc_now
from vitray.phases import Phase

if TYPE_CHECKING:
    from vitray.pipeline import Progress

GPU_EVERY_S = 5.0
BAR_WIDTH = 60


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """How far a run is, as a line on stderr.

    at: in ISO format, in UTC. phase: what the run does now. percent: of the work that is done; None
    while that is not known. images_seen: images that are done, or went through the model. images:
    images that are written. images_expected: images of this run's shards; None while only the sizes
    of shards are known. images_per_s: mean since the start. images_per_s_now: mean of the last 10 s
    or longer. eta_s: seconds that remain; None while that is not known. shards: shards of this run.
    shards_done: committed ones. shards_staged: ones that are written in part. shards_set_aside:
    ones that could not be read. resumed: images that an earlier run had written. failed: bad images
    by reason. bytes: encoded bytes that were read. seconds_by_step: sums over all workers. waiting:
    text about what waits for which stage. cpu: busy share of this machine's cores, 0 to 1. gpu: the
    same for each GPU of this machine.
    """

    at: str
    phase: Phase
    percent: float | None = None
    images_seen: int = 0
    images: int = 0
    images_expected: int | None = None
    images_per_s: float = 0.0
    images_per_s_now: float = 0.0
    eta_s: int | None = None
    shards: int = 0
    shards_done: int = 0
    shards_staged: int = 0
    shards_set_aside: int = 0
    resumed: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    seconds_by_step: dict[str, float] = field(default_factory=dict)
    waiting: str = ""
    cpu: float = 0.0
    gpu: list[float] = field(default_factory=list)


def starting_line() -> str:
    """The first line of a run, before it has begun to read."""
    return json_text(ProgressLine(utc_now(), Phase.STARTING))


def json_line(progress: Progress) -> str:
    """The progress of a run as one JSON object, for programs that read its log."""
    left_s = progress.remaining_s()
    share = progress.share()
    line = ProgressLine(
        at=utc_now(),
        phase=progress.phase,
        percent=None if share is None else round(100 * share, 1),
        images_seen=progress.images_seen,
        images=progress.images,
        images_expected=progress.images_expected,
        images_per_s=round(progress.rate(), 2),
        images_per_s_now=round(progress.recent_rate(), 2),
        eta_s=None if left_s is None else round(left_s),
        shards=progress.shards,
        shards_done=progress.shards_done,
        shards_staged=progress.shards_staged,
        shards_set_aside=progress.set_aside,
        resumed=progress.resumed,
        failed=progress.reasons,
        bytes=progress.size_bytes,
        seconds_by_step={step: round(seconds, 1) for step, seconds in progress.seconds.items()},
        waiting=progress.waiting(),
        cpu=round(_cpu_percent() / 100, 3),
        gpu=_gpu_shares(),
    )
    return json_text(line)


class RunView:
    """What a terminal shows of a run: a phase with its seconds, then also the figures.

    It is drawn several times a second, by another thread than that of the run. Figures are those of
    the last `update`.
    """

    def __init__(self) -> None:
        self._spinner = Spinner("dots")
        self._phase = Phase.STARTING
        self._began = time.monotonic()
        self._figures: Table | None = None

    def update(self, progress: Progress) -> None:
        if progress.phase is not self._phase:
            self._phase = progress.phase
            self._began = time.monotonic()
        if progress.shards:
            self._figures = view(progress)

    def __rich__(self) -> RenderableType:
        seconds = time.monotonic() - self._began
        self._spinner.update(text=Text(f"{self._phase}… {seconds:.0f} s"))
        return self._spinner if self._figures is None else Group(self._figures, self._spinner)


def view(progress: Progress) -> Table:
    """The progress of a run as a table, for a terminal."""
    share = progress.share()
    table = Table.grid(padding=(0, 2))
    percent = "" if share is None else f"{100 * share:.0f}%"
    bar = ProgressBar(
        1.0, share or 0.0, width=BAR_WIDTH, complete_style="cyan", finished_style="cyan"
    )
    table.add_row(percent, bar)
    for name, text in _view_rows(progress):
        table.add_row(name, Text(text))
    return table


def _view_rows(progress: Progress) -> list[tuple[str, str]]:
    expected = f" of {progress.images_expected:,}" if progress.images_expected else ""
    left_s = progress.remaining_s()
    computed = max(1, progress.computed)
    return [
        (
            "shards",
            f"{progress.shards_done:,} of {progress.shards:,} done, {progress.shards_staged:,} "
            f"staged in part, {progress.set_aside} set aside",
        ),
        (
            "images",
            f"{progress.images_seen:,}{expected}, {progress.errors:,} failed, "
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
        ("CPU here", f"{_cpu_percent():.0f}%"),
        *(
            (f"GPU {number} here", f"{100 * share:.0f}%")
            for number, share in enumerate(_gpu_shares())
        ),
    ]


def _cpu_percent() -> float:
    """How busy the cores of this machine were since the last call."""
    import psutil  # not before the first line of a run

    return float(psutil.cpu_percent())


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
