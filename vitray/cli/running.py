"""Run a job from the command line, with its progress on the terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from vitray.cli.console import screen, show
from vitray.cli.interrupts import RUN_RESUMES, finish_writes_when_terminated

if TYPE_CHECKING:
    from vitray.job import Job
    from vitray.pipeline import Progress

VIEW_EVERY_S = 0.5
LOG_EVERY_S = 10.0


def run_and_exit(
    job: Job,
    address: str | None,
    allow_open_cluster: bool,
    as_json: bool,
    *,
    prune: bool = False,
    planned: str | None = None,
    partition: str | None = None,
) -> NoReturn:
    """Run the job, print its result, and exit with its code.

    planned: the file of a plan to compare the run with. partition: such as 3/16.
    """
    from vitray.cli.summary import summary
    from vitray.operations.costing import read_plan
    from vitray.pipeline import parse_partition
    from vitray.pipeline import run as run_job

    expected = None if planned is None else read_plan(planned)
    part = None if partition is None else parse_partition(partition)
    stop = finish_writes_when_terminated(RUN_RESUMES)
    with watched() as report:
        result = run_job(
            job,
            address=address,
            prune=prune,
            progress=report,
            stop=stop,
            allow_open_cluster=allow_open_cluster,
            planned=expected,
            partition=part,
        )
    show(result, as_json, summary(result, job))
    raise typer.Exit(result.exit_code)


@contextlib.contextmanager
def watched() -> Iterator[Callable[[Progress], None]]:
    """A function that shows a run's progress.

    On a terminal it updates a view. Elsewhere it prints a JSON line every LOG_EVERY_S seconds, and
    one at the end.
    """
    from rich.console import Console
    from rich.live import Live

    from vitray.cli.progress_view import json_line, view

    if not sys.stderr.isatty():
        yield _at_most_every(
            LOG_EVERY_S, lambda progress: print(json_line(progress), file=sys.stderr, flush=True)
        )
        return
    live_view = Live(
        console=Console(stderr=True),
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live_view:
        screen.view = live_view
        try:
            yield _at_most_every(
                VIEW_EVERY_S, lambda progress: live_view.update(view(progress), refresh=True)
            )
        finally:
            screen.view = None


def _at_most_every(
    seconds: float, report: Callable[[Progress], None]
) -> Callable[[Progress], None]:
    """A function that calls `report` at most every `seconds`, and when the last shard is done."""
    return _Throttled(seconds, report).report


class _Throttled:
    def __init__(self, seconds: float, report: Callable[[Progress], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._last = time.monotonic() - seconds
        self._was_over = False

    def report(self, progress: Progress) -> None:
        is_over = progress.shards_done + progress.set_aside >= progress.shards
        is_due = time.monotonic() - self._last >= self._seconds
        if progress.shards and (is_due or (is_over and not self._was_over)):
            self._last = time.monotonic()
            self._report(progress)
        self._was_over = is_over
