"""`vitray rollback`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.accept import By
from vitray.cli.console import show
from vitray.cli.options import Json, expand_path


def rollback(
    pointer: Annotated[
        str,
        typer.Argument(metavar="POINTER", help="made by vitray promote", callback=expand_path),
    ],
    to: Annotated[
        int | None,
        typer.Option("--to", metavar="N", help="the version (default: the previous one)", min=1),
    ] = None,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Make a pointer name an earlier version again."""
    from vitray.operations import promoting

    change = promoting.rollback(pointer, to, by=by)
    show(change, as_json, str(change))
