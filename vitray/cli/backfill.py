"""`vitray backfill`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.job_flags import JOB_PANELS, config_flags
from vitray.cli.options import Address, Fields, Json, Open, expand_path, job_of
from vitray.cli.running import run_and_exit
from vitray.job import Job


@config_flags(Job, JOB_PANELS, without=["model", "out", "revision"])
def backfill(
    target: Annotated[
        str,
        typer.Argument(
            metavar="JOB.yaml", help="the job of the existing dataset", callback=expand_path
        ),
    ],
    fields: Fields,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="the next model: Hugging Face id, local directory or s3:// directory",
            callback=expand_path,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="the next dataset (default: the job's out and the model's name)",
            callback=expand_path,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, tag or commit of the next model")
    ] = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Run another model on the same shards, into a new dataset. Safe to repeat."""
    from vitray.operations.backfilling import next_job

    job = next_job(job_of(target, fields), model, out, revision)
    run_and_exit(job, address, allow_open_cluster, as_json)
