"""What a person sees of a run: while it goes on, and when it has ended."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable

from vitray.job import Job
from vitray.pipeline import Progress, Result


def summary(result: Result, job: Job) -> str:
    """What a person reads of a run that ended."""
    speed = f", {result.images / result.seconds:.1f} images/s with start-up" if result.images else ""
    took = f"{count(result.images, 'image')} computed in {result.seconds:.1f} s{speed}"
    lines = [
        f"{count(result.committed, 'shard')} committed now ({took})",
        f"{result.out}: {count(result.shards, 'shard')}, {count(result.rows, 'row')}, {count(result.errors, 'error')}",
    ]
    lines += [f"  {count} {reason} in this run" for reason, count in sorted(result.reasons.items())]
    lines += [f"set aside  {shard}: {why}" for shard, why in result.set_aside.items()]
    lines += [f"cut short  {s}: truncated at byte {n}; the rows before it are committed" for s, n in result.truncated.items()]
    lines += [f"note       {shard}: {text}" for shard, text in result.notes.items()]
    if result.gone:
        lines.append(f"no longer in the source: {count(result.gone, 'committed shard')}; --prune removes the rows")
    if result.shards and not result.rows + result.errors:
        lines.append("the shards held no image: check `source`")
    if result.too_many_errors:
        share = f"{result.errors} of {result.rows + result.errors}, more than max_error_rate={job.max_error_rate:g}"
        lines.append(f"too many bad images: {share}; see {result.out}/errors, or raise max_error_rate")
    if arrived := result.pending - len(result.set_aside):
        lines.append(f"arrived since: {count(arrived, 'shard')}; run again")
    if result.set_aside:
        lines.append(f"next: mend or remove those shards, then run again (vitray status {shlex.quote(job.out)})")
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    """The number and its noun, which takes an s."""
    return f"{number} {noun}" + "s" * (number != 1)


def reporter() -> Callable[[Progress], None]:
    """A line that is rewritten on a terminal, else one line for each shard."""
    live, last = sys.stderr.isatty(), {"at": 0.0, "shards": -1}

    def report(progress: Progress) -> None:
        now = time.monotonic()
        due = now - last["at"] >= 0.5 if live else progress.shards_done > last["shards"]
        if due and progress.shards:
            last["at"], last["shards"] = now, progress.shards_done
            ending = "\r" if live and progress.shards_done < progress.shards else "\n"
            print(f"{_progress_line(progress):<{100 if live else 1}}", end=ending, file=sys.stderr, flush=True)

    return report


def _progress_line(progress: Progress) -> str:
    at, of = (progress.images, progress.images_expected) if progress.images_expected else (progress.shards_done, progress.shards)
    left = int((time.monotonic() - progress.started) * max(0, of - at) / at) if at else None
    eta = "?" if left is None else f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
    return (
        f"shards {progress.shards_done}/{progress.shards}  images {progress.images}  {progress.rate():.1f} images/s  "
        f"ETA {eta}  failed {progress.errors}"
    )
