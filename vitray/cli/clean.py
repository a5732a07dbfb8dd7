"""`vitray clean`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.consent import require_consent
from vitray.cli.console import show
from vitray.cli.options import Json, expand_path
from vitray.errors import JobError


def clean(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT|POINTER",
            help="a dataset directory; with --keep-versions a pointer",
            callback=expand_path,
        ),
    ],
    keep_versions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="delete the datasets of older versions: all but the current one and the newest "
            "N-1 others",
            min=1,
        ),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="--keep-versions: delete without a question")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove staging that no run needs, and files that killed commands left behind.

    With --keep-versions: delete old versions of a pointer.
    """
    if keep_versions is not None:
        _delete_old_versions(out, keep_versions, yes, as_json)
        return
    if yes:
        raise JobError("--yes goes with --keep-versions N: add that, or leave --yes out.")
    from vitray.operations import cleaning

    result = cleaning.clean(out)
    show(result, as_json, str(result))


def _delete_old_versions(pointer: str, keep: int, yes: bool, as_json: bool) -> None:
    from vitray.operations import promoting

    result = promoting.preview_retention(pointer, keep)
    if result.old:
        require_consent(result.what, yes, result.describe())
        listed = [old.version for old in result.old]
        result = promoting.delete_old_versions(pointer, keep, listed)
    show(result, as_json, str(result))
