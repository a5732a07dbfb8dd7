"""The result of a run, as text for the terminal."""

from __future__ import annotations

import shlex

from vitray.errors import count
from vitray.job import Job
from vitray.left_out import describe
from vitray.operations.planning import describe_excluded
from vitray.pipeline import Result


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
        excluded = describe_excluded(result.shards_not_selected, result.images_not_selected)
        lines.append(f"excluded   {excluded}")
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
            "next: repair or remove those shards, then run again "
            f"(vitray status {shlex.quote(job.out)})"
        )
    return lines
