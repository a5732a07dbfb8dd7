"""`vitray run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitray.cli import nightly
from vitray.cli.consent import require_consent
from vitray.cli.job_flags import job_flags
from vitray.cli.options import Address, Fields, Json, Open, Target, expand_path, job_of
from vitray.cli.running import run_and_exit, try_and_exit
from vitray.errors import count

if TYPE_CHECKING:
    from vitray.job import Job

LISTED = 20  # files that a question names


@job_flags
def run(
    target: Target,
    fields: Fields,
    address: Address = None,
    try_images: Annotated[
        int | None,
        typer.Option(
            "--try",
            metavar="N",
            help="label only the first N images, into a scratch folder that is printed at the end",
            min=1,
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="delete rows whose input is gone, after a question")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="with --prune: delete without it")] = False,
    planned: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN.json",
            help="output of plan --probe --json, which the run record compares with the run",
            callback=expand_path,
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="begin with part I (from 0) of N, then help with the others: for N processes "
            "without a shared Ray cluster",
        ),
    ] = None,
    metrics_file: nightly.MetricsFileOption = None,
    metrics_port: nightly.MetricsPort = None,
    metrics_host: nightly.MetricsHost = None,
    metrics_name: nightly.MetricsName = None,
    notify: nightly.Notify = None,
    prices: nightly.Prices = None,
    max_hours: nightly.MaxHours = None,
    max_cost: nightly.MaxCost = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Label and embed what is missing. Safe to repeat."""
    if try_images is not None:
        try_and_exit(target, fields, try_images, address, allow_open_cluster, as_json)
    job = job_of(target, fields)
    if prune:
        _ask_before_pruning(job, yes)
    run_and_exit(
        job,
        address,
        allow_open_cluster,
        as_json,
        prune=prune,
        planned=planned,
        partition=partition,
        nightly=nightly.Nightly(
            metrics_file,
            metrics_port,
            metrics_host,
            metrics_name,
            notify,
            prices,
            max_hours,
            max_cost,
        ),
    )


def _ask_before_pruning(job: Job, yes: bool) -> None:
    """Show what --prune would delete, and ask. Raises JobError where nobody can be asked."""
    from vitray.pipeline import find_gone

    gone = find_gone(job)
    if not gone.images:
        return
    lines = [f"{shard}: {count(images, 'image')}" for shard, images in gone.shards.items()]
    lines += gone.files
    if len(lines) > LISTED:
        lines = [*lines[:LISTED], f"and {len(lines) - LISTED:,} more"]
    listed = "\n".join(["no longer in the source:", *(f"  {line}" for line in lines)])
    require_consent(f"the rows of {count(gone.images, 'image')}", yes, listed)
