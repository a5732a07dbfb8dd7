"""`vitray bench`."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from vitray.cli.console import say, show
from vitray.cli.interrupts import end_at_once_when_interrupted, remove_when_interrupted
from vitray.cli.job_flags import JOB_PANELS, config_flags
from vitray.cli.options import Fields, Json, Open, Target, is_file, job_of
from vitray.job import Job

if TYPE_CHECKING:
    from vitray.operations.bench import Bench
    from vitray.operations.bench_free_figures import FreeBench

UNUSED_MODEL = "free"  # the free model replaces it, so --model may be left out


@config_flags(Job, JOB_PANELS, without=["out"])
def bench(
    target: Target,
    fields: Fields,
    images: Annotated[
        int, typer.Option(help="number of images of the source to measure with", min=32)
    ] = 256,
    seconds: Annotated[
        float,
        typer.Option(
            help="how long to time each stage alone; with --free-model, by how much the two runs "
            "of a measurement differ",
            min=0.1,
        ),
    ] = 6.0,
    free_model: Annotated[
        int | None,
        typer.Option(
            "--free-model",
            metavar="[MICROSECONDS]",
            help="time the pipeline alone, locally and on Ray, with a model that costs nothing, or "
            "waits so long per image as a GPU would",
            min=0,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="the Ray cluster to measure, or `local` for a private one (default: RAY_ADDRESS, "
            "else none)",
        ),
    ] = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Time each stage alone and the whole pipeline. Leaves nothing in `out`."""
    from vitray.operations.bench_free import bench_free

    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        end_at_once_when_interrupted(
            "temporary files may remain in `out`; the next vitray bench --address, run or clean "
            "removes them."
        )
    if free_model is not None and not is_file(target):
        fields.setdefault("model", UNUSED_MODEL)
    with tempfile.TemporaryDirectory(prefix="vitray-bench-") as folder:
        remove_when_interrupted(folder)
        if not is_file(target):
            fields.setdefault("out", f"{folder}/out")
        job = job_of(target, fields)
        result: Bench | FreeBench
        if free_model is None:
            result = _bench(job, images, seconds, address, allow_open_cluster)
        else:
            result = bench_free(
                job,
                free_model,
                images,
                address,
                allow_open_cluster,
                seconds=seconds,
                folder=folder,
                report=lambda text: say(text, err=True),
            )
    show(result, as_json, str(result))


def _bench(
    job: Job, images: int, seconds: float, address: str | None, allow_open_cluster: bool
) -> Bench:
    from vitray.operations.bench import bench, bench_cluster

    if address:
        return bench_cluster(job, address, images, seconds, allow_open_cluster)
    return bench(job, images, seconds)
