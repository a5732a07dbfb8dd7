"""`vitray status`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, Open, expand_path
from vitray.cli.submit import show_submission
from vitray.errors import JobError


def status(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT|SUBMISSION",
            help="a dataset directory, or with --address the name from submit",
            callback=expand_path,
        ),
    ],
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
    if address is not None:
        from vitray.operations.submitting import Cluster

        cluster = Cluster(address, allow_open_cluster)
        show_submission(cluster, cluster.find(out), follow, as_json)
        return
    from vitray.operations.planning import status as dataset_status

    if follow:
        raise JobError("--follow is for a submission. Add --address URL, or leave --follow out.")
    progress = dataset_status(out)
    show(progress, as_json, str(progress))
