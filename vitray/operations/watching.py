"""The progress of a run and its result, as text."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import psutil
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.pipeline import Progress, Result

GPU_EVERY_S = 5.0


def summary(result: Result, job: Job) -> str:
    """The result of a run that ended, and the next steps."""
    return "\n".join(
        [
            *_totals(result),
            *_shard_lines(result),
            *_source_lines(result),
            *_next_steps(result, job),
        ]
    )


def _totals(result: Result) -> list[str]:
    speed = ""
    if result.images:
        speed = f", {result.images / result.seconds:.1f} images/s with start-up"
    by_others = f", {result.adopted} of them by another run" if result.adopted else ""
    took = f"{count(result.images, 'image')} computed in {result.seconds:.1f} s{speed}"
    return [
        f"{count(result.committed, 'shard')} committed now{by_others} ({took})",
        f"{result.out}: {count(result.shards, 'shard')}, {count(result.rows, 'row')}, "
        f"{count(result.errors, 'error')}",
        *(f"  {images} {reason} in this run" for reason, images in sorted(result.reasons.items())),
    ]


def _shard_lines(result: Result) -> list[str]:
    """Shards that were set aside or cut short, and what readers noted."""
    return [
        *(f"set aside  {shard}: {why}" for shard, why in result.set_aside.items()),
        *(
            f"cut short  {shard}: truncated at byte {byte}; the rows before it are committed"
            for shard, byte in result.truncated.items()
        ),
        *(f"note       {shard}: {text}" for shard, text in result.notes.items()),
    ]


def _source_lines(result: Result) -> list[str]:
    """What the source has, or had, without a row in the dataset."""
    lines = []
    if result.gone:
        gone = count(result.gone, "committed shard")
        lines.append(f"no longer in the source: {gone}; --prune removes the rows")
    if result.left_out:
        lines.append(f"left out   {describe(result.left_out, result.suffixes)}")
    if result.shards_not_selected:
        shards = count(result.shards_not_selected, "shard")
        images = count(result.images_not_selected, "image")
        lines.append(f"not chosen {shards} with {images}, by since, sample or limit")
    if result.shards and not result.rows + result.errors:
        lines.append("the shards held no image: check `source`")
    return lines


def _next_steps(result: Result, job: Job) -> list[str]:
    lines = []
    if result.too_many_errors:
        bad = result.errors - result.deleted
        share = f"{bad} of {result.rows + bad}, more than max_error_rate={job.max_error_rate:g}"
        lines.append(
            f"too many bad images: {share}; see {result.errors_path}, or raise max_error_rate"
        )
    if arrived := result.pending - len(result.set_aside):
        lines.append(f"arrived since: {count(arrived, 'shard')}; run again")
    if result.set_aside:
        lines.append(
            f"next: repair or remove those shards, then run again (vitray status "
            f"{shlex.quote(job.out)})"
        )
    return lines


def json_line(progress: Progress) -> str:
    """The progress of a run as one JSON object, for programs that read its log."""
    left_s = progress.remaining_s()
    fields = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
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
            f"{progress.images:,}{expected}, {progress.errors:,} failed, {progress.resumed:,} "
            f"found staged",
        ),
        (
            "images/s",
            f"{progress.recent_rate():,.1f} now, {progress.rate():,.1f} in the mean, "
            f"{decimal(progress.size_bytes)} read",
        ),
        ("ETA", "not known yet" if left_s is None else str(timedelta(seconds=round(left_s)))),
        *(("failed", f"{rows:,} {reason}") for reason, rows in sorted(progress.reasons.items())),
        *(
            (step, f"{1000 * seconds / computed:,.1f} ms an image, {seconds:,.0f} s in all")
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
