"""`vitray remove`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vitray.cli.consent import Change, require_consent
from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path
from vitray.errors import JobError, ObjectMissing, count


def remove(
    out: OutArgument,
    keys: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="one key on each line, as in the column `key` or as a JSON string in double "
            "quotes; - is stdin",
            callback=expand_path,
        ),
    ],
    note: Annotated[str | None, typer.Option(metavar="TEXT", help="why, for the record")] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="who asks (default: user@host)")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="remove without a question")] = False,
    as_json: Json = False,
) -> None:
    """Remove rows for good by their keys, and block these keys for later runs."""
    from vitray.operations.removing import parse_keys, preview_removal
    from vitray.operations.removing import remove as remove_rows
    from vitray.storage import read

    try:
        data = sys.stdin.buffer.read() if keys == "-" else read(keys)
    except ObjectMissing as error:
        raise JobError(f"--keys: {error}. Write one key on each line.") from error
    names = parse_keys(data, keys)
    if not yes:
        preview = preview_removal(out, names, by)
        if preview.would_delete:
            require_consent(preview.would_delete, yes, preview.describe_preview())
        elif preview.new_keys:
            what = f"{count(preview.new_keys, 'key')} that no row has"
            require_consent(what, yes, preview.describe_preview(), Change.BLOCK)
    removal = remove_rows(out, names, by=by, note=note or "")
    show(removal, as_json, str(removal))
