"""`vitray finetune`."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import say, show
from vitray.cli.interrupts import end_at_once_when_interrupted
from vitray.cli.options import Address, Json, Open, Sets, expand_path


def finetune(
    config: Annotated[
        str,
        typer.Argument(
            metavar="JOB.yaml",
            help="what to train: images, labels, model, out",
            callback=expand_path,
        ),
    ],
    sets: Sets = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Train a model on labelled images, or on a dataset; writes a checkpoint for --model.

    Safe to repeat.
    """
    from vitray.job import parse_set
    from vitray.training.config import load_config
    from vitray.training.finetuning import finetune as train

    end_at_once_when_interrupted("checkpoints stay. Run the same command again to continue.")
    training = load_config(config, parse_set(sets or []))
    result = train(training, _report, address, allow_open_cluster)
    show(result, as_json, str(result))


def _report(record: dict[str, float]) -> None:
    """Print the figures of an epoch or of a step."""
    if "epoch" in record:
        moment = f"epoch {record['epoch']:g}"
    else:
        moment = f"step {record['step']:g} of {record['steps']:g}"
    figures = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in record.items()
        if name not in ("epoch", "step", "steps")
    ]
    say(f"{moment}: {', '.join(figures)}", err=True)
