"""`vitray run`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.options import Address, Json, Model, Open, Out, Sets, Target, expand_path, job_of
from vitray.cli.running import run_and_exit


def run(
    target: Target,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    address: Address = None,
    prune: Annotated[bool, typer.Option(help="delete rows whose input is gone")] = False,
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
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Label and embed what is missing. Safe to repeat."""
    job = job_of(target, model, out, sets)
    run_and_exit(
        job,
        address,
        allow_open_cluster,
        as_json,
        prune=prune,
        planned=planned,
        partition=partition,
    )
