"""Commands for a group that runs vitray again and again, on a cluster, with the next model; and for
those who use what it made.
"""

from __future__ import annotations

from itertools import filterfalse
from typing import TYPE_CHECKING, Annotated

import typer

from vitray.cli.console import (
    Address,
    JobAddress,
    Json,
    Model,
    Open,
    Out,
    OutArgument,
    Sets,
    Target,
    end_at_once_when_interrupted,
    job_of,
    run_shown,
    say,
    show,
)
from vitray.errors import JobError, count

if TYPE_CHECKING:
    from vitray.operations.submitting import Cluster, Submission


def redo(
    out: OutArgument,
    shard: Annotated[list[str] | None, typer.Option(help="a shard id (repeatable)")] = None,
    reason: Annotated[
        list[str] | None, typer.Option(help="every shard with an error of this reason (repeatable)")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only list")] = False,
) -> None:
    """Delete chosen data files, so that the next run makes them again."""
    from vitray.dataset import forget, require_dataset, shards_to_redo
    from vitray.schema import REASONS

    if not (shard or reason) or set(reason or ()) - REASONS.keys():
        raise JobError(
            f"give --shard ID (a file in {out}/data, without .parquet) or --reason R, one of "
            f"{', '.join(REASONS)}"
        )
    dataset = require_dataset(out)
    chosen = shards_to_redo(dataset, shard or (), reason or ())
    files = count(len(chosen), "data file")
    deed = (
        f"deleting {files}; run the job again to make them anew"
        if yes
        else f"{files} would be deleted; add --yes to do it"
    )
    say("\n".join([*chosen, deed]))
    if yes:
        forget(dataset, chosen)


def backfill(
    target: Annotated[
        str, typer.Argument(metavar="JOB.yaml", help="the job of the dataset that is there")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="the next model: Hugging Face id, local directory or s3:// directory"
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="the next dataset (default: the job's out and the model's name)"
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="branch, tag or commit of the next model")
    ] = None,
    sets: Sets = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Make the next dataset, by another model, beside the old one from the same shards; safe to
    repeat.
    """
    from vitray.operations.backfilling import next_job

    run_shown(
        next_job(job_of(target, None, None, sets), model, out, revision),
        address,
        allow_open_cluster,
        as_json,
    )


def compare(
    old: Annotated[str, typer.Argument(metavar="OLD", help="a dataset directory")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="another, made from the same input")],
    min_agreement: Annotated[
        float | None, typer.Option(help="exit code 5 where fewer labels agree", min=0, max=1)
    ] = None,
    page: Annotated[
        str | None,
        typer.Option(
            "--page", metavar="FILE.html", help="also write a page with pictures of what moved"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what another model or other settings changed: labels, scores, embeddings."""
    from vitray.consume.comparing import compare as compare_datasets
    from vitray.dataset import is_complete, require_dataset

    found = compare_datasets(old, new)
    for dataset in filterfalse(is_complete, map(require_dataset, (old, new))):
        say(
            f"{dataset.out} is not complete: what it lacks is not compared (vitray status "
            f"{dataset.out})",
            err=True,
        )
    if min_agreement is not None and found.agreement is None:
        raise JobError(
            "--min-agreement: the two have no labels to compare. Leave it out, or compare "
            "datasets with labels."
        )
    show(found, as_json, str(found))
    if page is not None:
        from vitray.consume.report import report_changes

        say(str(report_changes(found, page)), err=as_json)
    raise typer.Exit(
        5 if min_agreement is not None and (found.agreement or 0.0) < min_agreement else 0
    )


def compact(
    out: OutArgument,
    into: Annotated[
        str, typer.Option("--into", help="directory for the large files, local or s3://")
    ],
    megabytes: Annotated[
        int, typer.Option(help="a file gets at least so many", min=1, max=2000)
    ] = 256,
    as_json: Json = False,
) -> None:
    """Gather the data files of a complete dataset into few large ones with the same rows."""
    from vitray.operations.compacting import compact as compact_dataset

    found = compact_dataset(out, into, megabytes)
    show(found, as_json, str(found))


def relabel(
    out: OutArgument,
    head: Annotated[
        str,
        typer.Option(
            "--head", help="directory of a linear head for this dataset's model, local or s3://"
        ),
    ],
    into: Annotated[
        str, typer.Option("--into", help="directory for the new dataset, local or s3://")
    ],
    as_json: Json = False,
) -> None:
    """Label a complete dataset anew by a head over its embeddings, as a dataset beside it; no image
    is read; safe to repeat.
    """
    from vitray.operations.relabelling import relabel as relabel_dataset

    found = relabel_dataset(out, head, into)
    show(found, as_json, str(found))


def submit(
    target: Target,
    address: JobAddress,
    model: Model = None,
    out: Out = None,
    sets: Sets = None,
    working_dir: Annotated[
        str | None,
        typer.Option(
            help="a directory that travels too, without what its .gitignore names: the job's "
            "current one there"
        ),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(help="a name for it; the cluster takes each once")
    ] = None,
    wait: Annotated[bool, typer.Option(help="follow it, and exit as it does")] = True,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Run a job on a cluster, by Ray's job API; Ctrl-C leaves it running."""
    from vitray.operations.submitting import Cluster, new_id

    cluster, name = Cluster(address, allow_open_cluster), submission_id or new_id()
    end_at_once_when_interrupted(
        f"it may have been submitted. Look: vitray status {name} --address {cluster.address}"
    )
    given = cluster.submit(job_of(target, model, out, sets), working_dir, name)
    _tell(cluster, given, wait, as_json)


def stop(
    submission: Annotated[str, typer.Argument(metavar="SUBMISSION", help="what submit named")],
    address: JobAddress,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Ask a submitted job to end; what is staged stays, and submitting it again goes on."""
    from vitray.operations.submitting import Cluster

    found = Cluster(address, allow_open_cluster).stop(submission)
    show(found, as_json, str(found))


def status(
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT|SUBMISSION",
            help="a dataset directory, or with --address what submit named",
        ),
    ],
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="the cluster's job API, like http://head:8265")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="of a submission: print what it prints, and exit as it does"),
    ] = False,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Say how far a dataset is, or a submitted job."""
    if address is not None:
        from vitray.operations.submitting import Cluster

        cluster = Cluster(address, allow_open_cluster)
        return _tell(cluster, cluster.find(out), follow, as_json)
    from vitray.operations.planning import status as dataset_status

    if follow:
        raise JobError("--follow is for a submission. Add --address URL, or leave --follow out.")
    found = dataset_status(out)
    show(found, as_json, str(found))


def _tell(cluster: Cluster, submission: Submission, follow: bool, as_json: bool) -> None:
    if follow:
        end_at_once_when_interrupted(
            f"the job goes on. Come back with vitray status {submission.id} --follow --address "
            f"{cluster.address}"
        )
        if not as_json:
            say(str(submission))
        submission = cluster.follow(submission.id, lambda text: say(text.rstrip("\n"), err=as_json))
    show(submission, as_json, str(submission))
    raise typer.Exit(submission.exit_code or 0 if follow else 0)


def search(
    out: OutArgument,
    image: Annotated[
        str | None, typer.Option("--image", help="a picture: local path or s3://")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            help="the row of this key, or of the key that ends so; the first, when several do",
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option("--shard", help="with --row: the row of this shard")
    ] = None,
    row: Annotated[
        int | None, typer.Option("--row", help="with --shard: the row of this index", min=0)
    ] = None,
    k: Annotated[int, typer.Option("--k", help="how many rows to name", min=1, max=10_000)] = 10,
    column: Annotated[
        str | None, typer.Option("--column", help="the vector column, where there are several")
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index", metavar="FILE", help="search by a FAISS index: made here when missing or old"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Name the rows nearest to a picture, or to a row, by cosine."""
    from vitray.consume.searching import Query
    from vitray.consume.searching import search as search_dataset

    found = search_dataset(out, Query(image, key, shard, row), k, column, index)
    show(found, as_json, str(found))


def export(
    what: Annotated[
        str, typer.Argument(metavar="OUT|MODEL", help="a dataset directory; or what model: takes")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="of rows: lance, faiss, npy, webdataset, csv; of a model: onnx, openvino, "
            "torch-export, coreml",
        ),
    ],
    into: Annotated[str, typer.Option("--into", help="a new local folder")],
    column: Annotated[
        str | None,
        typer.Option("--column", help="faiss, npy: the vector column, where there are several"),
    ] = None,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="csv: with the vectors, as [1,2,3]")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="rows: also of a dataset that is not complete")
    ] = False,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", metavar="SOURCE", help="a model: 500 images to judge on, 800 with --int8"
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx, openvino: weights and activations")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="onnx, openvino, coreml: half the size")
    ] = False,
    int8_weights: Annotated[
        bool, typer.Option("--int8-weights", help="onnx, openvino: a quarter of the size")
    ] = False,
    int4_weights: Annotated[
        bool, typer.Option("--int4-weights", help="onnx, openvino: an eighth of the size")
    ] = False,
    min_agreement: Annotated[
        float | None,
        typer.Option(
            help="a model: exit code 5, and nothing written, where fewer labels agree", min=0, max=1
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="a model: a field of the job, such as embeddings=[…]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a dataset's rows as other tools read them, or a model as other engines run it, smaller
    and judged on your images.

    Of rows: exit code 3 when images of a webdataset could not be read again.
    """
    from vitray.consume import exporting
    from vitray.model_export import graphs

    chosen = {
        "int8": int8,
        "fp16": fp16,
        "int8-weights": int8_weights,
        "int4-weights": int4_weights,
    }
    how = [name for name, wanted in chosen.items() if wanted]
    of_model = {
        "--calibrate": calibrate,
        "--min-agreement": min_agreement,
        "--set": sets,
        **{f"--{name}": True for name in how},
    }
    of_rows = {"--column": column, "--vectors": vectors or None, "--partial": partial or None}
    is_model = to in graphs.KNOWN
    if not is_model and to not in exporting.WRITERS:
        rows, models = ", ".join(exporting.WRITERS), ", ".join(graphs.KNOWN)
        raise JobError(f"--to {to}: of a dataset's rows choose one of {rows}; of a model {models}.")
    odd = [name for name, value in (of_rows if is_model else of_model).items() if value is not None]
    if odd:
        raise JobError(
            f"--to {to} takes no {', '.join(odd)}: "
            f"{'that is for rows' if is_model else 'that is for a model'}."
        )
    if not is_model:
        found = exporting.export(what, into, exporting.Wanted(to, column, vectors, partial))
        show(found, as_json, str(found))
        raise typer.Exit(3 if found.missing else 0)
    from vitray.errors import Disagreement
    from vitray.job import make_job, parse_set
    from vitray.model_export.export import export_model

    if len(how) > 1:
        raise JobError(f"choose one of --{', --'.join(how)}.")
    if calibrate is None:
        raise JobError(
            "--calibrate SOURCE is missing: an export is judged on your own images before it is "
            "written."
        )
    job = make_job(
        {**parse_set(sets or []), "source": calibrate, "model": what, "out": "not-written"}
    )
    try:
        made = export_model(job, to, how[0] if how else "", into, min_agreement)
    except Disagreement as error:
        show(error.judged, as_json, str(error.judged))
        raise
    show(made, as_json, str(made))


def report(
    out: OutArgument,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="FILE.html", help="where (default: ./<name of OUT>-report.html)"
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="passthrough column with the true label, for calibration"
        ),
    ] = None,
    pictures: Annotated[
        bool, typer.Option(help="read images of the source again to show some")
    ] = True,
    card: Annotated[
        bool, typer.Option("--card", help="also write OUT/README.md, a Hugging Face dataset card")
    ] = False,
    license: Annotated[
        str, typer.Option(metavar="ID", help="the card's license, such as cc-by-4.0")
    ] = "unknown",
    as_json: Json = False,
) -> None:
    """Show a dataset on one HTML page that needs nothing else."""
    from vitray.consume.report import report as report_dataset
    from vitray.consume.report import write_card

    found = report_dataset(out, to, truth, pictures)
    text = str(found) + (f"\n{write_card(out, license)}: the dataset card" if card else "")
    show(found, as_json, text)


COMMANDS = (status, submit, stop, redo, backfill, compare, compact, relabel, search, export, report)
