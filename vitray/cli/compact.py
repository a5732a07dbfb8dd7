"""`vitray compact`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path


def compact(
    out: OutArgument,
    into: Annotated[
        str,
        typer.Option(
            "--into", help="directory for the large files, local or s3://", callback=expand_path
        ),
    ],
    megabytes: Annotated[int, typer.Option(help="minimum size of a file", min=1, max=2000)] = 256,
    as_json: Json = False,
) -> None:
    """Copy the rows of a complete dataset into few large files."""
    from vitray.operations.compacting import compact as compact_dataset

    compaction = compact_dataset(out, into, megabytes)
    show(compaction, as_json, str(compaction))
