"""`vitray bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.options import Json, Model, Sets, Target, is_file, job_of, scratch_out


def bench(
    target: Target,
    model: Model = None,
    sets: Sets = None,
    images: Annotated[
        int, typer.Option(help="number of images of the source to measure with", min=32)
    ] = 256,
    seconds: Annotated[
        float, typer.Option(help="how long to time each stage alone", min=0.1)
    ] = 6.0,
    as_json: Json = False,
) -> None:
    """Time each stage alone and the whole pipeline. Writes nothing to `out`."""
    from vitray.operations.bench import bench as bench_job

    if is_file(target):
        result = bench_job(job_of(target, model, None, sets), images, seconds)
    else:
        with scratch_out() as out:
            result = bench_job(job_of(target, model, out, sets), images, seconds)
    show(result, as_json, str(result))
