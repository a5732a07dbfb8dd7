"""Run a job from the command line, with its progress on the terminal."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from vitray.cli.console import draws_view, live_view, show
from vitray.cli.interrupts import (
    RUN_RESUMES,
    end_at_once_when_interrupted,
    finish_writes_when_terminated,
    remove_when_interrupted,
)
from vitray.cli.nightly import NOT_NIGHTLY, Nightly, report_end
from vitray.cli.options import Fields, job_of

if TYPE_CHECKING:
    from vitray.job import Job
    from vitray.pipeline import Gone, Progress

VIEW_EVERY_S = 0.5
LOG_EVERY_S = 10.0


def run_and_exit(
    job: Job,
    address: str | None,
    allow_open_cluster: bool,
    as_json: bool,
    *,
    prune: bool | Gone = False,
    planned: str | None = None,
    partition: str | None = None,
    nightly: Nightly = NOT_NIGHTLY,
) -> NoReturn:
    """Run the job, print its result, and exit with its code.

    planned: the file of a plan to compare the run with. partition: such as 3/16.
    """
    stop = finish_writes_when_terminated(RUN_RESUMES)
    budget = nightly.budget()
    with watched() as report, report_end(nightly, job.out) as reporting:
        from vitray.cli.summary import summary
        from vitray.operations.costing import read_plan
        from vitray.pipeline import parse_partition
        from vitray.pipeline import run as run_job

        expected = None if planned is None else read_plan(planned)
        part = None if partition is None else parse_partition(partition)
        result = run_job(
            job,
            address=address,
            prune=prune,
            progress=report,
            stop=stop,
            allow_open_cluster=allow_open_cluster,
            planned=expected,
            partition=part,
            budget=budget,
            meter=reporting.meter,
        )
        reporting.exit_code = result.exit_code
    show(result, as_json, summary(result, job))
    raise typer.Exit(result.exit_code)


def try_and_exit(target: str, fields: Fields, images: int, as_json: bool) -> NoReturn:
    """Label the first images of the job's source into a scratch folder, and print their labels.

    The job's own `out` may be left out; it is not used. A trial runs on this machine alone, since
    others do not see the folder.
    """
    os.environ.pop("RAY_ADDRESS", None)
    end_at_once_when_interrupted("nothing was kept.")
    folder = tempfile.mkdtemp(prefix="vitray-try-")
    remove_when_interrupted(folder)
    try:
        job = job_of(target, {**fields, "out": f"{folder}/dataset"})
        with watched() as report:
            from vitray.operations.trying import try_job
            from vitray.pipeline import run as run_job

            trial = try_job(job, images, lambda sample: run_job(sample, progress=report))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    show(trial, as_json, str(trial))
    raise typer.Exit(trial.exit_code)


@contextlib.contextmanager
def watched() -> Iterator[Callable[[Progress], None]]:
    """A function that shows a run's progress.

    On a terminal it updates a view, which is removed after a run that ended well. Elsewhere, and
    where stderr is JSON, it prints a JSON line for each phase, every LOG_EVERY_S seconds, and at
    the end.
    """
    from vitray.cli.progress_view import RunView, json_line, starting_line

    if not draws_view():
        print(starting_line(), file=sys.stderr, flush=True)
        yield _Throttled(
            LOG_EVERY_S, lambda progress: print(json_line(progress), file=sys.stderr, flush=True)
        ).report
        return
    run_view = RunView()
    with live_view(run_view):
        yield _Throttled(VIEW_EVERY_S, run_view.update).report


class _Throttled:
    """Calls `report` at most every `seconds`, and at the start of each phase."""

    def __init__(self, seconds: float, report: Callable[[Progress], None]) -> None:
        self._seconds = seconds
        self._report = report
        self._last = time.monotonic() - seconds
        self._phase = ""

    def report(self, progress: Progress) -> None:
        is_due = time.monotonic() - self._last >= self._seconds
        if is_due or progress.phase != self._phase:
            self._last = time.monotonic()
            self._phase = progress.phase
            self._report(progress)
