"""`vitray export`: a dataset's rows for other tools."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path
from vitray.errors import JobError
from vitray.exit_codes import ExitCode


def export(
    out: OutArgument,
    to: Annotated[str, typer.Option("--to", help="lance, faiss, npy, webdataset or csv")],
    into: Annotated[str, typer.Option("--into", help="a new local folder", callback=expand_path)],
    column: Annotated[
        str | None,
        typer.Option("--column", help="faiss, npy: the vector column, if there are several"),
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="csv: with the vectors, as [1,2,3]")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="export a dataset that is not complete, too")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a dataset's rows in the format of another tool.

    Exit code 3 if images for a webdataset could not be read again.
    """
    from vitray.consume import exporting
    from vitray.model_export import graphs

    if to not in exporting.WRITERS:
        rows, models = ", ".join(exporting.WRITERS), ", ".join(graphs.KNOWN)
        raise JobError(
            f"--to {to}: choose one of {rows}; vitray export-model writes a model as {models}."
        )
    result = exporting.export(out, into, exporting.ExportOptions(to, column, vectors, partial))
    show(result, as_json, str(result))
    raise typer.Exit(ExitCode.INCOMPLETE if result.missing else ExitCode.DONE)
