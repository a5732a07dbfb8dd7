"""The runs of a dataset, from their records in OUT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any

from vitray.budget import Limit
from vitray.dataset import RecordKind, is_run, newest_run_records, require_dataset, run_start
from vitray.errors import count
from vitray.exit_codes import ExitCode
from vitray.operations.costing import span

LINE_CHARS = 80
# Exit codes of runs whose record has none, by the error in `ended`; of any other error it is 1.
CODES_OF_ERRORS: Mapping[str, ExitCode] = {
    "Interrupted": ExitCode.TERMINATED,
    "ErrorRateExceeded": ExitCode.TOO_MANY_BAD_IMAGES,
}


class Outcome(StrEnum):
    """How a run ended, in words for people and programs."""

    DONE = "done"
    NOTHING_TO_DO = "nothing to do"
    INCOMPLETE = "incomplete"
    TOO_MANY_BAD_IMAGES = "too many bad images"
    BUDGET_SPENT = "budget spent"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run. Counts are of this run, and None where the record does not have them.

    run: its id. kind: `run`, or the command that changed the dataset. started, finished: in ISO
    format, in UTC. bad_images: by reason. committed, set_aside, truncated: shards. pruned: removed
    rows. cost: by purpose, with its `total`; None without prices. error: the type of the error that
    ended the run. message: the text of that error. limit: of the budget, which ended the run.
    by, removed_rows: who asked for a removal, and how many rows and error rows it removed.
    """

    run: str
    kind: str
    outcome: Outcome
    exit_code: int
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    images: int | None = None
    bad_images: dict[str, int] = field(default_factory=dict)
    committed: int | None = None
    set_aside: int | None = None
    truncated: int | None = None
    pending: int | None = None
    pruned: int | None = None
    cost: dict[str, float] | None = None
    error: str | None = None
    message: str | None = None
    limit: Limit | None = None
    by: str | None = None
    removed_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of the dataset in `out`, newest last. damaged: names of unreadable records."""

    out: str
    runs: list[RunSummary]
    damaged: list[str]

    def __str__(self) -> str:
        if not self.runs:
            lines = [f"{self.out}: no run is recorded"]
        else:
            has_cost = any(summary.cost for summary in self.runs)
            lines = [_header(has_cost), *(_line(summary, has_cost) for summary in self.runs)]
        return "\n".join([*lines, *(f"not readable: {name}" for name in self.damaged)])


def list_runs(out: str, last: int | None = None) -> Runs:
    """The runs of a dataset. last: only so many of the newest. Raises JobError if there is none."""
    dataset = require_dataset(out)
    summaries = list[RunSummary]()
    damaged = list[str]()
    for name, record in islice(newest_run_records(dataset.out), last):
        if record is None:
            damaged.append(name)
        else:
            summaries.append(summary_of({"run": name.removesuffix(".json"), **record}))
    return Runs(dataset.out, summaries[::-1], damaged[::-1])


def summary_of(record: Mapping[str, Any]) -> RunSummary:
    """What a run record says, also one of an earlier version of vitray."""
    ended = str(record.get("ended") or "")
    limit = next((one for one in Limit if one == ended), None)
    error, _, message = ("", "", "") if limit else ended.partition(": ")
    code = _exit_code(record, error)
    run = str(record.get("run", ""))
    return RunSummary(
        run=run,
        kind=str(record.get("kind", RecordKind.RUN)),
        outcome=_outcome(record, code),
        exit_code=code,
        started=record.get("started") or _start_in(run),
        finished=record.get("finished"),
        seconds=_rounded(record.get("seconds")),
        images=record.get("images"),
        bad_images=dict(record.get("reasons") or {}),
        committed=record.get("committed"),
        set_aside=_length(record.get("set_aside")),
        truncated=_length(record.get("truncated")),
        pending=record.get("pending"),
        pruned=record.get("pruned"),
        cost=record.get("cost"),
        error=error or None,
        message=message or None,
        limit=limit,
        by=record.get("by"),
        removed_rows=record.get("removed_rows"),
    )


def age_of_complete(
    records: Iterable[tuple[str, dict[str, Any] | None]], now: datetime
) -> float | None:
    """Age in seconds of the last run that ended with exit code 0; None if there is none.

    A run with nothing to do counts; a removal, or another command that changes the dataset, does
    not. records: pairs of name and record, newest first.
    """
    for name, record in records:
        if record is None:
            continue
        summary = summary_of({"run": name.removesuffix(".json"), **record})
        finished = _moment(summary.finished)
        is_complete = is_run(record) and summary.exit_code == ExitCode.DONE
        if is_complete and finished is not None:
            return max(0.0, (now - finished).total_seconds())
    return None


def _exit_code(record: Mapping[str, Any], error: str) -> int:
    code = record.get("exit_code")
    if isinstance(code, int):
        return code
    if error:
        return CODES_OF_ERRORS.get(error, ExitCode.BROKEN_SYSTEM)
    if record.get("too_many_errors"):
        return ExitCode.TOO_MANY_BAD_IMAGES
    is_whole = not record.get("set_aside") and not record.get("truncated")
    return ExitCode.DONE if is_whole else ExitCode.INCOMPLETE


def _outcome(record: Mapping[str, Any], code: int) -> Outcome:
    if code == ExitCode.DONE:
        is_idle = not any(record.get(name) for name in ("images", "committed", "pruned"))
        return Outcome.NOTHING_TO_DO if is_run(record) and is_idle else Outcome.DONE
    return {
        int(ExitCode.INCOMPLETE): Outcome.INCOMPLETE,
        int(ExitCode.TOO_MANY_BAD_IMAGES): Outcome.TOO_MANY_BAD_IMAGES,
        int(ExitCode.BUDGET_SPENT): Outcome.BUDGET_SPENT,
        int(ExitCode.TERMINAL_CLOSED): Outcome.INTERRUPTED,
        int(ExitCode.INTERRUPTED): Outcome.INTERRUPTED,
        int(ExitCode.TERMINATED): Outcome.INTERRUPTED,
    }.get(code, Outcome.FAILED)


def _start_in(run: str) -> str | None:
    """The start of a run by its id, in ISO format; None for an id of another form."""
    start = run_start(run)
    return None if start is None else start.isoformat(timespec="seconds")


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, (dict, list)) else None


def _rounded(seconds: Any) -> float | None:
    return round(seconds, 3) if isinstance(seconds, (int, float)) else None


def _header(has_cost: bool) -> str:
    return _row("started (UTC)", "took", "images", "pruned", "cost" if has_cost else "", "exit", "")


def _line(summary: RunSummary, has_cost: bool) -> str:
    start = _moment(summary.started)
    cost = f"{summary.cost['total']:,.2f}" if summary.cost else "-"
    return _row(
        "-" if start is None else f"{start.astimezone(UTC):%Y-%m-%d %H:%M}",
        "-" if summary.seconds is None else span(summary.seconds),
        _number(summary.images),
        _number(summary.pruned),
        cost if has_cost else "",
        str(summary.exit_code),
        _end(summary),
    )


def _row(start: str, took: str, images: str, pruned: str, cost: str, code: str, end: str) -> str:
    """A line of at most LINE_CHARS characters; without the column `cost` if it is empty."""
    middle = f"{cost:>9}" if cost else ""
    line = f"{start:<16}{took:>9}{images:>13}{pruned:>8}{middle}{code:>6}  {end}".rstrip()
    return line if len(line) <= LINE_CHARS else f"{line[: LINE_CHARS - 1]}…"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _end(summary: RunSummary) -> str:
    """How a run ended, in few words. Other commands than `run` are named."""
    text = summary.limit or str(summary.outcome)
    if summary.error and summary.outcome is Outcome.FAILED:
        text = summary.error
    if summary.kind == RecordKind.RUN:
        return text
    if summary.removed_rows is not None:
        text = f"{count(summary.removed_rows, 'row')}, by {summary.by}"
    return f"{summary.kind}: {text}"
