"""`vitray search`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path


def search(
    out: OutArgument,
    image: Annotated[
        str | None,
        typer.Option("--image", help="an image: local path or s3://", callback=expand_path),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            help="the row whose key is this or ends with it; the first, if there are several",
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="with --row: the row of this shard")
    ] = None,
    row: Annotated[
        int | None, typer.Option("--row", help="with --shard: the row of this index", min=0)
    ] = None,
    k: Annotated[int, typer.Option("--k", help="number of rows to show", min=1, max=10_000)] = 10,
    column: Annotated[
        str | None, typer.Option("--column", help="the vector column, if there are several")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="FILE",
            help="a FAISS index to use; made if missing or outdated",
            callback=expand_path,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the rows nearest to an image, or to a row, by cosine similarity."""
    from vitray.consume.searching import Query
    from vitray.consume.searching import search as search_dataset

    hits = search_dataset(out, Query(image, key, shard, row), k, column, index)
    show(hits, as_json, str(hits))
