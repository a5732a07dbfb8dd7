"""`vitray redo`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import say
from vitray.cli.options import OutArgument
from vitray.errors import JobError, count


def redo(
    out: OutArgument,
    shard: Annotated[list[str] | None, typer.Option(help="a shard id (repeatable)")] = None,
    reason: Annotated[
        list[str] | None, typer.Option(help="every shard with an error of this reason (repeatable)")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only list")] = False,
) -> None:
    """Delete chosen data files, so that the next run makes them again."""
    from vitray.dataset import delete_data_files, require_dataset, shards_to_redo
    from vitray.schema import REASONS

    shards, reasons = shard or [], reason or []
    if not shards + reasons or set(reasons) - REASONS.keys():
        raise JobError(
            f"give --shard ID (a file in {out}/data, without .parquet) or --reason R, one of "
            f"{', '.join(REASONS)}"
        )
    dataset = require_dataset(out)
    chosen = shards_to_redo(dataset, shards, reasons)
    files = count(len(chosen), "data file")
    if yes:
        say("\n".join([*chosen, f"deleting {files}; run the job again to recreate them"]))
        delete_data_files(dataset, chosen)
    else:
        say("\n".join([*chosen, f"{files} would be deleted; add --yes to do it"]))
