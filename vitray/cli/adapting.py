"""Commands that make a model the user's own."""

from __future__ import annotations

from typing import Annotated

import typer

from vitray.cli.console import Address, Json, Open, Sets, end_at_once_when_interrupted, say, show


def finetune(
    config: Annotated[
        str, typer.Argument(metavar="JOB.yaml", help="what to train: images, labels, model, out")
    ],
    sets: Sets = None,
    address: Address = None,
    allow_open_cluster: Open = False,
    as_json: Json = False,
) -> None:
    """Train a model on labelled images, or on a dataset; writes a checkpoint that --model takes.
    Safe to repeat.
    """
    from vitray.job import parse_set
    from vitray.training.config import load_config
    from vitray.training.finetuning import finetune as train

    def tell(record: dict[str, float]) -> None:
        at = (
            f"epoch {record['epoch']:g}"
            if "epoch" in record
            else f"step {record['step']:g} of {record['steps']:g}"
        )
        figures = (
            f"{name.replace('_', ' ')} {record[name]:.4g}"
            for name in record
            if name not in ("epoch", "step", "steps")
        )
        say(f"{at}: {', '.join(figures)}", err=True)

    end_at_once_when_interrupted("checkpoints stay. Run the same command again to go on.")
    found = train(load_config(config, parse_set(sets or [])), tell, address, allow_open_cluster)
    show(found, as_json, str(found))


COMMANDS = (finetune,)
