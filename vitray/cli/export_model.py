"""`vitray export-model`: a checkpoint in another format."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.job_flags import JOB_PANELS, config_flags
from vitray.cli.options import Fields, Json, expand_path, scratch_out
from vitray.errors import Disagreement, JobError
from vitray.job import Job, make_job


@config_flags(Job, JOB_PANELS, without=["model", "out"])
def export_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="a model, as the job's field `model` takes it",
            callback=expand_path,
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, torch-export or coreml")],
    into: Annotated[str, typer.Option("--into", help="a new local folder", callback=expand_path)],
    fields: Fields,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="SOURCE",
            help="images to calibrate and judge with: the export reads 500, and 800 with --int8 "
            "(required)",
            callback=expand_path,
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="onnx, openvino: weights and activations in 8 bits")
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
        typer.Option(help="exit code 5, and no output, if fewer labels agree", min=0, max=1),
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a model to another format, smaller if you ask, and judge it on your images."""
    from vitray.model_export.export import ExportedModel
    from vitray.model_export.export import export_model as export_checkpoint

    chosen = {
        "int8": int8,
        "fp16": fp16,
        "int8-weights": int8_weights,
        "int4-weights": int4_weights,
    }
    quantisations = [name for name, is_chosen in chosen.items() if is_chosen]
    if len(quantisations) > 1:
        raise JobError(f"choose one of --{', --'.join(quantisations)}.")
    if calibrate is None:
        raise JobError(
            "--calibrate SOURCE is missing: "
            "an export is compared with the original on your own images before it is written."
        )
    quantisation = quantisations[0] if quantisations else ""
    with scratch_out() as out:
        job = make_job({**fields, "source": calibrate, "model": model, "out": out})
        try:
            exported = export_checkpoint(job, to, quantisation, into, min_agreement)
        except Disagreement as error:
            assert isinstance(error.export, ExportedModel)
            show(error.export.figures(), as_json, str(error.export))
            raise
    show(exported.figures(), as_json, str(exported))


def is_of_model(arguments: Sequence[str]) -> bool:
    """Whether the arguments of `vitray export` ask for a format of models."""
    from vitray.model_export import graphs

    formats = {
        *(value for option, value in itertools.pairwise(arguments) if option == "--to"),
        *(word.removeprefix("--to=") for word in arguments if word.startswith("--to=")),
    }
    return bool(formats & graphs.KNOWN.keys())
