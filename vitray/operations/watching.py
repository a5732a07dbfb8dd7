"""What a person sees of a run: while it goes on, and when it has ended."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import subprocess
import time
from datetime import UTC, datetime, timedelta

import psutil
from rich.console import RenderableType
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.pipeline import Progress, Result

LOOK_S = 5.0


def summary(result: Result, job: Job) -> str:
    """What a person reads of a run that ended."""
    speed = (
        f", {result.images / result.seconds:.1f} images/s with start-up" if result.images else ""
    )
    by_others = f", {result.adopted} of them by another run" if result.adopted else ""
    took = f"{count(result.images, 'image')} computed in {result.seconds:.1f} s{speed}"
    lines = [
        f"{count(result.committed, 'shard')} committed now{by_others} ({took})",
        f"{result.out}: {count(result.shards, 'shard')}, {count(result.rows, 'row')}, "
        f"{count(result.errors, 'error')}",
    ]
    lines += [f"  {count} {reason} in this run" for reason, count in sorted(result.reasons.items())]
    lines += [f"set aside  {shard}: {why}" for shard, why in result.set_aside.items()]
    lines += [
        f"cut short  {s}: truncated at byte {n}; the rows before it are committed"
        for s, n in result.truncated.items()
    ]
    lines += [f"note       {shard}: {text}" for shard, text in result.notes.items()]
    if result.gone:
        lines.append(
            f"no longer in the source: {count(result.gone, 'committed shard')}; --prune removes "
            f"the rows"
        )
    if result.left_out:
        lines.append(f"left out   {describe(result.left_out, result.suffixes)}")
    if result.shards_not_selected:
        what = (
            f"{count(result.shards_not_selected, 'shard')} with "
            f"{count(result.images_not_selected, 'image')}"
        )
        lines.append(f"not chosen {what}, by since, sample or limit")
    if result.shards and not result.rows + result.errors:
        lines.append("the shards held no image: check `source`")
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
            f"next: mend or remove those shards, then run again (vitray status "
            f"{shlex.quote(job.out)})"
        )
    return "\n".join(lines)


def json_line(progress: Progress) -> str:
    """How far a run is, for a program that reads its log."""
    fields = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": progress.images,
        "images_expected": progress.images_expected,
        "images_per_s": round(progress.rate(), 2),
        "images_per_s_now": round(progress.rate_now(), 2),
        "eta_s": None if (left := progress.left_s()) is None else round(left),
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
        "gpu": _gpus(),
    }
    return json.dumps(fields)


def view(progress: Progress) -> Table:
    """How far a run is, for a person at a terminal."""
    left = progress.left_s()
    known = progress.images_expected
    of = f" of {known:,}" if known else ""
    bar = ProgressBar(
        total=known or progress.shards, completed=progress.images if known else progress.shards_done
    )
    computed = max(1, progress.images - progress.resumed)
    rows: list[tuple[str, RenderableType]] = [
        ("", bar),
        (
            "shards",
            f"{progress.shards_done:,} of {progress.shards:,} done, {progress.shards_staged:,} "
            f"staged in part, {progress.set_aside} set aside",
        ),
        (
            "images",
            f"{progress.images:,}{of}, {progress.errors:,} failed, {progress.resumed:,} found "
            f"staged",
        ),
        (
            "images/s",
            f"{progress.rate_now():,.1f} now, {progress.rate():,.1f} in the mean, "
            f"{decimal(progress.size_bytes)} read",
        ),
        ("ETA", "not known yet" if left is None else str(timedelta(seconds=round(left)))),
        *(("failed", f"{count:,} {reason}") for reason, count in sorted(progress.reasons.items())),
        *(
            (f"{step}", f"{1000 * s / computed:,.1f} ms an image, {s:,.0f} s in all")
            for step, s in progress.seconds.items()
        ),
        ("waiting", progress.waiting()),
        ("CPU here", f"{psutil.cpu_percent():.0f}%"),
        *((f"GPU {n} here", f"{100 * share:.0f}%") for n, share in enumerate(_gpus())),
    ]
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(name, value if isinstance(value, ProgressBar) else Text(str(value)))
    return table


_seen: list[tuple[float, list[float]]] = []


def _gpus() -> list[float]:
    """The share of time in which each NVIDIA GPU of this machine worked; asked for once in LOOK_S,
    and no more once it did not answer.
    """
    if _seen and time.monotonic() - _seen[-1][0] < LOOK_S:
        return _seen[-1][1]
    at, shares, command = math.inf, list[float](), shutil.which("nvidia-smi")
    if command:
        argv = [command, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            answer = subprocess.run(argv, capture_output=True, timeout=5, check=True).stdout
            at, shares = time.monotonic(), [int(line) / 100 for line in answer.split()]
    _seen[:] = [(at, shares)]
    return shares
