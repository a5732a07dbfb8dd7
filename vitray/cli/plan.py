"""`vitray plan`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from vitray.budget import PRICES
from vitray.cli.console import show
from vitray.cli.interrupts import end_at_once_when_interrupted
from vitray.cli.job_flags import job_flags
from vitray.cli.options import Fields, Json, Open, Target, expand_path, job_of
from vitray.errors import JobError
from vitray.operations.costing import estimate, read_prices

if TYPE_CHECKING:
    from vitray.job import Job
    from vitray.operations.bench import Bench

PROBE_S = 3.0


@job_flags
def plan(
    target: Target,
    fields: Fields,
    probe: Annotated[
        int,
        typer.Option(
            help="measure with this many images of the source, here or at --address, and estimate "
            "time and cost",
            min=0,
        ),
    ] = 0,
    machines: Annotated[
        int | None,
        typer.Option(
            help="with --probe: number of such machines (default: those that were measured)", min=1
        ),
    ] = None,
    prices: Annotated[
        str | None,
        typer.Option(
            metavar="PRICES.yaml", help=f"with --probe: {', '.join(PRICES)}", callback=expand_path
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="with --probe: the Ray cluster to measure (default: RAY_ADDRESS, else none)",
        ),
    ] = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Show what a run would do; with --probe also its time and cost. Leaves nothing behind.

    A job that a run would refuse is refused here, too.
    """
    from vitray.operations.planning import plan as plan_job

    if not probe:
        _refuse_without_probe(address, machines, prices)
    table = read_prices(prices) if prices is not None else None
    job = job_of(target, fields)
    address = address or os.environ.get("RAY_ADDRESS")
    job_plan = plan_job(job, runs_here=not address)
    if not (probe and as_json):
        show(job_plan, as_json, str(job_plan))
    if probe:
        rates = _rates(job, probe, address, allow_open_cluster)
        expected = estimate(job_plan.pending_images, job_plan.pending, rates, machines, table)
        show(expected, as_json, str(expected))


def _refuse_without_probe(address: str | None, machines: int | None, prices: str | None) -> None:
    values = {"--address": address, "--machines": machines, "--prices": prices}
    for option, value in values.items():
        if value is not None:
            raise JobError(f"{option}: only --probe N measures. Add it, or leave {option} out.")


def _rates(job: Job, images: int, address: str | None, allow_open_cluster: bool) -> Bench:
    """The speed of each stage, on this machine or on a cluster."""
    from vitray.operations.bench import bench, bench_cluster

    if not address:
        return bench(job, images, PROBE_S, job.out)
    end_at_once_when_interrupted(
        "no plan was made. Temporary files may remain in `out`; "
        "the next vitray plan --probe, run or clean removes them."
    )
    return bench_cluster(job, address, images, PROBE_S, allow_open_cluster)
