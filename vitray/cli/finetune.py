"""`vitray finetune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from vitray.cli.console import show
from vitray.cli.interrupts import end_at_once_when_interrupted
from vitray.cli.job_flags import config_flags
from vitray.cli.options import Address, Fields, Json, Open, expand_path, is_file
from vitray.cli.training_view import print_epoch, watched_training
from vitray.errors import JobError
from vitray.training.config import TrainingConfig, load_config, make_config

# The panels of --help, each with its fields in the order in which they are listed.
PANELS: Mapping[str, Sequence[str]] = {
    "Images": (
        "source", "dataset", "format", "image_column", "key_column", "image_member", "allow",
        "formats",
    ),
    "Labels": (
        "label", "label_field", "label_table", "table_key", "classes", "unlabelled", "min_score",
    ),
    "Model": ("model", "revision", "train", "init", "last", "rank", "column"),
    "Output": ("out", "save_steps"),
    "Training": (
        "epochs", "batch_size", "lr", "schedule", "warmup", "weight_decay", "layer_decay", "clip",
        "class_weights", "label_smoothing", "seed",
    ),
    "Random changes of images": ("flip", "crop", "mixup"),
    "Choice of the best epoch": ("validation", "metric", "patience"),
    "Teacher": ("teacher", "teacher_model", "distill", "teacher_weight", "temperature"),
    "Speed and memory": ("device", "precision", "accumulate", "gradient_checkpointing", "workers"),
}  # fmt: skip


@config_flags(TrainingConfig, PANELS)
def finetune(
    fields: Fields,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB.yaml|SOURCE",
            help="a file of the fields below (source, label, model, out, train, …), or labelled "
            "images: path, glob, prefix, s3://…",
            callback=expand_path,
        ),
    ] = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Train a model on labelled images, or on a dataset; writes a checkpoint for --model.

    Safe to repeat. For images in class folders: vitray finetune photos --model MODEL --out NEW.
    """
    end_at_once_when_interrupted("checkpoints stay. Run the same command again to continue.")
    training = config_of(config, fields)
    with watched_training() as watch:
        from vitray.training.finetuning import finetune as train

        result = train(training, print_epoch, address, allow_open_cluster, watch)
    show(result, as_json, str(result))


def config_of(target: str | None, fields: Fields) -> TrainingConfig:
    """The training of a file or a source, with the fields of the command line on top.

    target: None if all fields are on the command line. Raises JobError.
    """
    if target is None:
        return make_config(fields)
    if is_file(target):
        return load_config(target, fields)
    if "source" in fields:
        raise JobError("`source` is given twice, as an argument and by --source.")
    return make_config({"source": target, **fields})
