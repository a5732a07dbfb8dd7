"""`vitray check`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.job_flags import job_flags
from vitray.cli.options import Fields, Json, Target, job_of
from vitray.errors import JobError


@job_flags
def check(
    target: Target,
    fields: Fields,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="a Ray cluster that will run the job: leave out what this machine lacks "
            "(default: RAY_ADDRESS)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say whether a job would start: fields, source, model, store rights, fingerprint.

    Exit code 0: it would. 2: something has to change. 1: a store gives no answer.
    """
    from vitray.operations.checking import check as check_job
    from vitray.operations.checking import refused_fields

    runs_here = not (address or os.environ.get("RAY_ADDRESS"))
    try:
        result = check_job(job_of(target, fields), runs_here=runs_here)
    except JobError as error:
        result = refused_fields(error)
    show(result, as_json, str(result))
    raise typer.Exit(result.exit_code)
