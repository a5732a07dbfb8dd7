"""`vitray accept`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument
from vitray.errors import JobError

By = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="who asks (default: user@host)")
]


def accept(
    out: OutArgument,
    shard: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="a shard id (repeatable)")
    ] = None,
    reason: Annotated[
        list[str] | None,
        typer.Option(help="every such shard: truncated or set-aside (repeatable)"),
    ] = None,
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="why, for the record")] = None,
    by: By = None,
    list_all: Annotated[bool, typer.Option("--list", help="list the accepted shards")] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="withdraw the acceptance of --shard")
    ] = False,
    as_json: Json = False,
) -> None:
    """Accept known-bad inputs: later runs report them and exit with 0.

    A new version of an input is not accepted.
    """
    from vitray.dataset import Problem
    from vitray.operations import accepting

    shards, reasons = shard or [], reason or []
    if list_all and (undo or shards or reasons):
        raise JobError("--list takes no other choice: leave it out, or the others.")
    if undo and reasons:
        raise JobError("--undo takes --shard ID, not --reason.")
    if unknown := [name for name in reasons if name not in set(Problem)]:
        raise JobError(f"--reason {unknown[0]}: choose truncated or set-aside.")
    if list_all:
        result = accepting.list_accepted(out)
    elif undo:
        result = accepting.withdraw(out, shards)
    else:
        problems = [Problem(name) for name in reasons]
        result = accepting.accept(out, shards, problems, by=by, note=note or "")
    show(result, as_json, str(result))
