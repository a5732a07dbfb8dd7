"""`vitray status`."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, Open, expand_path
from vitray.cli.submit import show_submission
from vitray.errors import JobError
from vitray.exit_codes import ExitCode

SECONDS_OF = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def status(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT|SUBMISSION",
            help="a dataset directory, or with --address the name from submit",
            callback=expand_path,
        ),
    ],
    max_age: Annotated[
        str | None,
        typer.Option(
            metavar="AGE",
            help="exit with 6 unless a run ended with 0 within this time: 26h, 7d, 90m, 3600s",
        ),
    ] = None,
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="the cluster's job API, like http://head:8265")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="of a submission: print its output, and exit with its code"),
    ] = False,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Show the progress of a dataset, or of a submitted job."""
    most_s = None if max_age is None else read_age(max_age)
    if address is not None:
        from vitray.operations.submitting import Cluster

        if most_s is not None:
            raise JobError("--max-age is for a dataset. Leave --address out, or --max-age.")
        cluster = Cluster(address, allow_open_cluster)
        show_submission(cluster, cluster.find(out), follow, as_json)
        return
    from vitray.operations.planning import status as dataset_status

    if follow:
        raise JobError("--follow is for a submission. Add --address URL, or leave --follow out.")
    progress = dataset_status(out)
    if most_s is None:
        show(progress, as_json, str(progress))
        return
    age_s = progress.complete_age_s
    is_stale = age_s is None or age_s > most_s
    judged = dataclasses.replace(progress, max_age_s=most_s, stale=is_stale)
    show(judged, as_json, f"{progress}\n{_age_line(age_s, str(max_age), is_stale)}")
    if is_stale:
        raise typer.Exit(ExitCode.STALE)


def read_age(text: str) -> float:
    """The seconds of an age such as 26h. Raises JobError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise JobError(
            f"--max-age {text} is no age. Give a number and a unit: 3600s, 90m, 26h or 7d."
        )
    return float(match[1]) * SECONDS_OF[match[2]]


def _age_line(age_s: float | None, max_age: str, is_stale: bool) -> str:
    """How old the last complete run is, beside what is allowed."""
    from vitray.operations.costing import span

    if age_s is None:
        return f"too old    no complete run yet; --max-age allows {max_age}"
    age = f"the last complete run ended {span(age_s)} ago; --max-age allows {max_age}"
    return f"{'too old' if is_stale else 'age':<10} {age}"
