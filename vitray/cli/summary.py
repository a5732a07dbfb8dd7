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
    work = result.committed or result.images or result.set_aside or result.pruned
    if not work and result.ended_by is None:
        or_accepted = " or accepted" if result.accepted else ""
        first = f"nothing to do: every selected shard is committed{or_accepted}"
        return [first, *_dataset_lines(result)]
    took = f"{count(result.images, 'image')} computed in {result.seconds:.1f} s{speed}"
    return [
        f"{count(result.committed, 'shard')} committed now{by_others} ({took})",
        *_dataset_lines(result),
        *(f"  {images} {reason} in this run" for reason, images in sorted(result.reasons.items())),
    ]


def _dataset_lines(result: Result) -> list[str]:
    lines = [
        f"{result.out}: {count(result.shards, 'shard')}, {count(result.rows, 'row')}, "
        f"{count(result.errors, 'error')}"
    ]
    if result.pruned:
        lines.append(f"pruned     {count(result.pruned, 'image')} that left the source")
    if result.cost is not None:
        cost = result.cost
        lines.append(
            f"cost       {cost.total:,.2f} (machines {cost.machines:,.2f}, requests "
            f"{cost.requests:,.2f})"
        )
    return lines


def _shard_lines(result: Result) -> list[str]:
    """Shards that were set aside or cut short, and what readers noted."""
    return [
        *(f"set aside  {shard}: {why}" for shard, why in result.set_aside.items()),
        *(
            f"cut short  {shard}: truncated at byte {byte:,}; the rows before it are committed"
            for shard, byte in result.truncated.items()
            if shard not in result.accepted
        ),
        *(f"accepted   {shard}: {text}" for shard, text in result.accepted.items()),
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
    left = result.pending - len(result.set_aside)
    if result.ended_by is not None:
        option = f"--{result.ended_by.replace('_', '-')}"
        lines.append(
            f"ended by {option}: {count(left, 'shard')} left; "
            "run the same command again to continue"
        )
    elif left:
        lines.append(f"{count(left, 'new shard')} arrived during the run; run again to label them")
    if result.set_aside:
        lines.append(
            "next: repair or remove those shards, then run again "
            f"(vitray status {shlex.quote(job.out)})"
        )
    kinds = {"set-aside": set(result.set_aside), "truncated": set(result.truncated)}
    reasons = [name for name, shards in kinds.items() if shards - result.accepted.keys()]
    if reasons:
        options = " ".join(f"--reason {name}" for name in reasons)
        accept = f"vitray accept {shlex.quote(job.out)} {options}"
        lines.append(f"if this is known, and later runs should exit with 0: {accept}")
    return lines
