"""Commands for a team that runs vitray again and again: the next model, what it changed, fewer files, a page to show."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import Address, Json, Open, OutArgument, Sets, job_of, run_shown, show
from vitray.errors import JobError


def backfill(
    target: Annotated[str, typer.Argument(metavar="JOB.yaml", help="the job of the dataset that is there")],
    model: Annotated[str, typer.Option("--model", help="the next model: Hugging Face id, local directory or s3:// directory")],
    out: Annotated[
        str | None, typer.Option("--out", help="the next dataset (default: the job's out and the model's name)")
    ] = None,
    sets: Sets = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Make the next dataset, by another model, beside the old one from the same shards; safe to repeat."""
    from vitray.backfilling import next_job

    run_shown(next_job(job_of(target, None, None, sets), model, out), address, allow_open_cluster, as_json)


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help="a dataset directory")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="another, made from the same input")],
    min_agreement: Annotated[float | None, typer.Option(help="exit code 5 where fewer labels agree", min=0, max=1)] = None,
    as_json: Json = False,
) -> None:
    """Say what another model or other settings changed: labels, scores, embeddings."""
    from vitray.comparing import compare as compare_datasets

    found = compare_datasets(old, new)
    if min_agreement is not None and found.agreement is None:
        raise JobError("--min-agreement: the two have no labels to compare. Leave it out, or compare datasets with labels.")
    show(found, as_json, str(found))
    raise typer.Exit(5 if min_agreement is not None and (found.agreement or 0.0) < min_agreement else 0)


def compact(
    out: OutArgument,
    into: Annotated[str, typer.Option("--into", help="directory for the large files, local or s3://")],
    megabytes: Annotated[int, typer.Option(help="a file gets at least so many", min=1, max=2000)] = 256,
    as_json: Json = False,
) -> None:
    """Gather the data files of a complete dataset into few large ones with the same rows."""
    from vitray.compacting import compact as compact_dataset

    found = compact_dataset(out, into, megabytes)
    show(found, as_json, str(found))


def report(
    out: OutArgument,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FILE.html", help="where (default: ./<name of OUT>-report.html)")
    ] = None,
    truth: Annotated[str | None, typer.Option(metavar="COLUMN", help="kept column with the true label, for calibration")] = None,
    pictures: Annotated[bool, typer.Option(help="read images of the source again to show some")] = True,
    card: Annotated[bool, typer.Option("--card", help="also write OUT/README.md, a Hugging Face dataset card")] = False,
    license: Annotated[str, typer.Option(metavar="ID", help="the card's license, such as cc-by-4.0")] = "unknown",
    as_json: Json = False,
) -> None:
    """Show a dataset on one HTML page that needs nothing else."""
    from vitray.report import report as report_dataset
    from vitray.report import write_card

    found = report_dataset(out, to, truth, pictures)
    text = str(found) + (f"\n{write_card(out, license)}: the dataset card" if card else "")
    show(found, as_json, text)


COMMANDS = (backfill, compare, compact, report)
