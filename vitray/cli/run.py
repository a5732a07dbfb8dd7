"""`vitray run`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from vitray.cli import nightly
from vitray.cli.consent import require_consent, require_terminal
from vitray.cli.console import say
from vitray.cli.job_flags import job_flags
from vitray.cli.options import Address, Fields, Json, Open, Target, expand_path, job_of
from vitray.cli.running import run_and_exit, try_and_exit
from vitray.errors import JobError, count

if TYPE_CHECKING:
    from vitray.job import Job
    from vitray.pipeline import Gone

LISTED = 20  # files that a question names
# Parameters that a trial would ignore.
NOT_OF_A_TRIAL = {
    *("address", "prune", "yes", "planned", "partition", "notify", "prices", "max_hours"),
    *("max_cost", "metrics_file", "metrics_port", "metrics_host", "metrics_name"),
}


@job_flags
def run(
    ctx: typer.Context,
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
    yes: Annotated[bool, typer.Option("--yes", help="with --prune: delete without asking")] = False,
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
        _refuse_with_try(ctx)
        try_and_exit(target, fields, try_images, as_json)
    if prune and not yes:
        require_terminal("--prune asks before it deletes rows")
    job = job_of(target, fields)
    agreed = _ask_before_pruning(job) if prune and not yes else None
    run_and_exit(
        job,
        address,
        allow_open_cluster,
        as_json,
        prune=prune if agreed is None else agreed,
        planned=planned,
        partition=partition,
        nightly=nightly.Nightly(
            metrics_file=metrics_file,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            metrics_name=metrics_name,
            notify=notify,
            prices=prices,
            max_hours=max_hours,
            max_cost=max_cost,
        ),
    )


def _refuse_with_try(ctx: typer.Context) -> None:
    """Raise JobError for an option that a trial would ignore."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        is_given = source is not None and source.name == "COMMANDLINE"  # not VITRAY_NOTIFY
        if option.name in NOT_OF_A_TRIAL and is_given:
            raise JobError(
                f"{option.opts[0]}: --try labels a few images on this machine, into a scratch "
                f"folder. Leave {option.opts[0]} out, or --try."
            )


def _ask_before_pruning(job: Job) -> Gone:
    """Show what --prune would delete, and ask. Returns what the user agrees to delete."""
    from vitray.pipeline import find_gone

    say("reading the source…", err=True)
    gone = find_gone(job)
    if gone.images:
        lines = [f"{shard}: {count(images, 'image')}" for shard, images in gone.shards.items()]
        lines += gone.files
        if len(lines) > LISTED:
            lines = [*lines[:LISTED], f"and {len(lines) - LISTED:,} more"]
        listed = "\n".join(["no longer in the source:", *(f"  {line}" for line in lines)])
        require_consent(f"the rows of {count(gone.images, 'image')}", False, listed)
    return gone
