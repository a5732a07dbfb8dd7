"""`vitray promote`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.accept import By
from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path


def promote(
    out: OutArgument,
    pointer: Annotated[
        str,
        typer.Option(
            "--as",
            metavar="POINTER",
            help="the pointer, local or s3://, such as s3://photos-vit/current; made if missing",
            callback=expand_path,
        ),
    ],
    partial: Annotated[
        bool, typer.Option("--partial", help="promote a dataset that is not complete, too")
    ] = False,
    by: By = None,
    as_json: Json = False,
) -> None:
    """Make a pointer name this dataset: commands and vitray.read follow the pointer.

    The pointer keeps its earlier versions, for vitray rollback.
    """
    from vitray.operations import promoting

    change = promoting.promote(out, pointer, partial=partial, by=by)
    show(change, as_json, str(change))
