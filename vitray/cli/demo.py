"""`vitray demo`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vitray.cli.console import say
from vitray.cli.interrupts import RUN_RESUMES, end_at_once_when_interrupted
from vitray.cli.options import expand_path
from vitray.cli.running import watched
from vitray.exit_codes import ExitCode


def demo(
    directory: Annotated[
        str, typer.Argument(help="where to put model, shards and output", callback=expand_path)
    ] = "demo",
    address: Annotated[str | None, typer.Option(help="a Ray cluster, or `local`")] = None,
) -> None:
    """Draw shapes, train a tiny ViT on them, label and embed them, and check the result."""
    from vitray.cli.summary import summary
    from vitray.dataset import DATA_GLOB
    from vitray.operations import demo as shapes
    from vitray.operations.validation import validate as validate_dataset
    from vitray.pipeline import run as run_job

    end_at_once_when_interrupted(RUN_RESUMES)
    say("drawing shapes and training a tiny ViT …")
    job, held_out = shapes.build(directory)
    if held_out is not None:
        say(f"trained: accuracy {held_out:.3f} on held-out shapes")
    with watched() as report:
        result = run_job(job, address=address, progress=report)
    say(summary(result, job))
    validation = validate_dataset(job.out, content=True)
    say(str(validation))
    files = os.path.join(job.out, DATA_GLOB)
    say(f"accuracy {shapes.accuracy(job.out):.3f} of the labels against what was drawn")
    quoted = files.replace("'", "''")
    say(f"Parquet  {files}")
    say(f"query    duckdb -c \"select label, count(*), avg(score) from '{quoted}' group by label\"")
    raise typer.Exit(result.exit_code if validation.ok else ExitCode.BROKEN_SYSTEM)
