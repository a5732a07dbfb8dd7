"""`vitray compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import say, show
from vitray.cli.options import Json, expand_path
from vitray.errors import JobError
from vitray.exit_codes import ExitCode


def compare(
    old: Annotated[
        str, typer.Argument(metavar="OLD", help="a dataset directory", callback=expand_path)
    ],
    new: Annotated[
        str,
        typer.Argument(
            metavar="NEW", help="another, made from the same input", callback=expand_path
        ),
    ],
    min_agreement: Annotated[
        float | None, typer.Option(help="exit code 5 if fewer labels agree", min=0, max=1)
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(
            "--page",
            metavar="FILE.html",
            help="also write a page with images that changed most",
            callback=expand_path,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what another model or other settings changed: labels, scores, embeddings."""
    from vitray.consume.comparing import compare as compare_datasets

    comparison = compare_datasets(old, new)
    _warn_if_incomplete(old, new)
    if min_agreement is not None and comparison.agreement is None:
        raise JobError(
            "--min-agreement: the two have no labels to compare. Leave it out, or compare "
            "datasets with labels."
        )
    show(comparison, as_json, str(comparison))
    if page is not None:
        from vitray.consume.report import report_changes

        say(str(report_changes(comparison, page)), err=as_json)
    agrees = min_agreement is None or (comparison.agreement or 0.0) >= min_agreement
    raise typer.Exit(ExitCode.DONE if agrees else ExitCode.TOO_LITTLE_AGREEMENT)


def _warn_if_incomplete(*outs: str) -> None:
    from vitray.dataset import is_complete, require_dataset

    for out in outs:
        dataset = require_dataset(out)
        if not is_complete(dataset):
            say(
                f"{dataset.out} is not complete: missing rows are not compared "
                f"(vitray status {dataset.out})",
                err=True,
            )
