"""`vitray runs`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument


def runs(
    out: OutArgument,
    last: Annotated[
        int | None, typer.Option(metavar="N", help="only the newest N runs", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the runs of a dataset: start, duration, images, exit code; the newest last."""
    from vitray.operations.runs import list_runs

    listed = list_runs(out, last)
    show(listed, as_json, str(listed))
