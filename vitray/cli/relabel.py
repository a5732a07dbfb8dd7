"""`vitray relabel`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path


def relabel(
    out: OutArgument,
    head: Annotated[
        str,
        typer.Option(
            "--head",
            help="directory of a linear head for this dataset's model, local or s3://",
            callback=expand_path,
        ),
    ],
    into: Annotated[
        str,
        typer.Option(
            "--into", help="directory for the new dataset, local or s3://", callback=expand_path
        ),
    ],
    as_json: Json = False,
) -> None:
    """Label a complete dataset with a head over its embeddings, into a new dataset.

    Reads no image. Safe to repeat.
    """
    from vitray.operations.relabelling import relabel as relabel_dataset

    relabelling = relabel_dataset(out, head, into)
    show(relabelling, as_json, str(relabelling))
