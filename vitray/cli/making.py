"""Commands that make a dataset, and those that look at one."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vitray.cli.console import (
    RUN_STAYS,
    Address,
    Json,
    Model,
    Open,
    Out,
    OutArgument,
    Sets,
    Target,
    end_at_once_when_interrupted,
    is_file,
    job_of,
    run_shown,
    say,
    show,
    watched,
)
from vitray.errors import JobError, count
from vitray.operations.costing import PRICES, estimate, read_prices

PROBE_S = 3.0


def run(
    target: Target,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    address: Address = None,
    prune: Annotated[bool, typer.Option(help="delete rows whose input is gone")] = False,
    planned: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN.json",
            help="what plan --probe --json said, for the run record to hold against",
        ),
    ] = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Label and embed what is missing; safe to repeat."""
    run_shown(
        job_of(target, model, out, sets), address, allow_open_cluster, as_json, prune, planned
    )


def plan(
    target: Target,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    probe: Annotated[
        int,
        typer.Option(
            help="time so many images of the source, here or at --address, and say what the rest "
            "takes",
            min=0,
        ),
    ] = 0,
    machines: Annotated[
        int | None,
        typer.Option(
            help="with --probe: how many such machines (default: those that were measured)", min=1
        ),
    ] = None,
    prices: Annotated[
        str | None, typer.Option(metavar="PRICES.yaml", help=f"with --probe: {', '.join(PRICES)}")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="with --probe: the Ray cluster to measure (default: RAY_ADDRESS, else none)",
        ),
    ] = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Say what a run would do, and with --probe what it would take; leaves nothing behind."""
    from vitray.operations.planning import plan as plan_job

    of_probe = {"--address": address, "--machines": machines, "--prices": prices}
    if odd := [name for name, value in of_probe.items() if value is not None and not probe]:
        raise JobError(f"{odd[0]}: only --probe N measures. Add it, or leave {odd[0]} out.")
    table = read_prices(prices) if prices is not None else None
    job = job_of(target, model, out, sets)
    found = plan_job(job)
    if not (probe and as_json):
        show(found, as_json, str(found))
    if probe:
        from vitray.operations.bench import bench as bench_job
        from vitray.operations.bench import bench_cluster

        if where := address or os.environ.get("RAY_ADDRESS"):
            end_at_once_when_interrupted(
                "no plan was made. A later plan --probe, run or clean of this dataset removes "
                "_vitray/probe-… from it."
            )
            rates = bench_cluster(job, where, probe, PROBE_S, allow_open_cluster)
        else:
            rates = bench_job(job, probe, PROBE_S, job.out)
        expected = estimate(found.pending_images, found.pending, rates, machines, table)
        show(expected, as_json, str(expected))


def bench(
    target: Target,
    model: Model = None,
    sets: Sets = None,
    images: Annotated[
        int, typer.Option(help="how many images of the source to measure with", min=32)
    ] = 256,
    seconds: Annotated[
        float, typer.Option(help="how long each step is timed alone", min=0.1)
    ] = 6.0,
    as_json: Json = False,
) -> None:
    """Time each step alone and the whole line on the first images of the source; writes nothing to
    `out`.
    """
    from vitray.operations.bench import bench as bench_job

    found = bench_job(
        job_of(target, model, None if is_file(target) else "not-written", sets), images, seconds
    )
    show(found, as_json, str(found))


def validate(
    out: OutArgument,
    inputs: Annotated[bool, typer.Option(help="list the source again and compare")] = True,
    content: Annotated[
        bool, typer.Option(help="read every image's bytes again and compare hashes")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every data file against manifest, footer and inputs; exit code 1 when something is
    wrong.
    """
    from vitray.operations.validation import validate as validate_dataset

    found = validate_dataset(out, inputs, content)
    show(found, as_json, str(found))
    raise typer.Exit(0 if found.ok else 1)


def clean(out: OutArgument) -> None:
    """Remove staging that no run needs any more, and what killed commands left."""
    from vitray.dataset import clean as clean_dataset
    from vitray.dataset import require_dataset
    from vitray.pipeline import list_source

    dataset = require_dataset(out)
    removed = clean_dataset(dataset, [s.id for s in list_source(dataset.job, dataset.out).shards])
    say("\n".join([*removed, f"removed {count(len(removed), 'orphan')}"]))


def demo(
    directory: Annotated[
        str, typer.Argument(help="where to put model, shards and output")
    ] = "demo",
    address: Annotated[str | None, typer.Option(help="a Ray cluster, or local")] = None,
) -> None:
    """Draw shapes, train a tiny ViT on them, label and embed them, check the result."""
    from vitray.operations import demo as shapes
    from vitray.operations.validation import validate as validate_dataset
    from vitray.operations.watching import summary
    from vitray.pipeline import run as run_job

    end_at_once_when_interrupted(RUN_STAYS)
    say("drawing shapes and training a tiny ViT …")
    job, held_out = shapes.build(directory)
    if held_out == held_out:  # NaN: it was trained by an earlier call
        say(f"trained: accuracy {held_out:.3f} on held-out shapes")
    with watched() as report:
        result = run_job(job, address=address, progress=report)
    say(summary(result, job))
    checked = validate_dataset(job.out, content=True)
    say(str(checked))
    files = os.path.join(job.out, "data", "*.parquet")
    say(f"accuracy {shapes.accuracy(job.out):.3f} of the labels against what was drawn")
    quoted = files.replace("'", "''")
    say(f"Parquet  {files}")
    say(f"query    duckdb -c \"select label, count(*), avg(score) from '{quoted}' group by label\"")
    raise typer.Exit(result.exit_code if checked.ok else 1)


COMMANDS = (run, plan, bench, validate, clean, demo)
