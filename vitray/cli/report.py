"""`vitray report`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, OutArgument, expand_path


def report(
    out: OutArgument,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE.html",
            help="where (default: ./<name of OUT>-report.html)",
            callback=expand_path,
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN|folder|FILE.csv",
            help="true labels, for accuracy and calibration: a passthrough column, the names of "
            "the images' folders, or a CSV file with the columns key and label",
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="read images of the source again to show some")
    ] = True,
    card: Annotated[
        bool,
        typer.Option("--card", help="also write OUT/_vitray/README.md, a card for Hugging Face"),
    ] = False,
    license: Annotated[
        str, typer.Option(metavar="ID", help="the card's license, such as cc-by-4.0")
    ] = "unknown",
    as_json: Json = False,
) -> None:
    """Show a dataset on one self-contained HTML page."""
    from vitray.consume.report import report as report_dataset
    from vitray.consume.report import write_card

    result = report_dataset(out, to, truth, pictures)
    text = str(result)
    if card:
        text += f"\n{write_card(out, license)}: the dataset card"
    show(result, as_json, text)
