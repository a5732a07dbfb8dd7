"""`vitray redo`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument
from vitray.errors import JobError


def redo(
    out: OutArgument,
    shard: Annotated[list[str] | None, typer.Option(help="a shard id (repeatable)")] = None,
    reason: Annotated[
        list[str] | None, typer.Option(help="every shard with an error of this reason (repeatable)")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only list")] = False,
    as_json: Json = False,
) -> None:
    """Delete chosen data files, so that the next run makes them again."""
    from vitray.operations import redoing
    from vitray.schema import REASONS

    shards, reasons = shard or [], reason or []
    if not shards + reasons or set(reasons) - REASONS.keys():
        raise JobError(
            f"give --shard ID (a file in {out}/data, without .parquet) or --reason R, one of "
            f"{', '.join(REASONS)}"
        )
    result = redoing.redo(out, shards, reasons, delete=yes)
    show(result, as_json, str(result))
