"""`vitray validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument
from vitray.exit_codes import ExitCode


def validate(
    out: OutArgument,
    inputs: Annotated[bool, typer.Option(help="list the source again and compare")] = True,
    content: Annotated[
        bool, typer.Option(help="read every image's bytes again and compare hashes")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every data file against manifest, footer and inputs; exit code 1 on a problem."""
    from vitray.operations.validation import validate as validate_dataset

    validation = validate_dataset(out, inputs, content)
    show(validation, as_json, str(validation))
    raise typer.Exit(ExitCode.DONE if validation.ok else ExitCode.BROKEN_SYSTEM)
