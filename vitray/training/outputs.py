"""What a training leaves in OUT: the checkpoint, its card, metrics, TensorBoard events, the
page.
"""

from __future__ import annotations

import html
import json
import logging
import os
import shutil
import string
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitray.dataset import package_versions
from vitray.errors import StorageError, one_line
from vitray.models.checkpoint import Checkpoint, quiet
from vitray.models.head import Head, write_head
from vitray.models.pixels import FILES
from vitray.storage import absolute, join, store_for
from vitray.training.config import TEACHER_FIELDS, TrainingConfig
from vitray.training.page import page_of

if TYPE_CHECKING:
    from vitray.training.fitting import Judged

log = logging.getLogger(__name__)
SHARD_BYTES = "2GB"  # of weights in one file: S3 takes 5 GB at once
PACKAGES = ("vitray", "torch", "transformers")


@dataclass(frozen=True)
class Told:
    """How it went. records: of steps, epochs, or a probe's strengths; figures: of the weights that
    were chosen.
    """

    config: TrainingConfig
    found: Checkpoint
    classes: tuple[str, ...]
    records: list[dict[str, float]]
    skipped: list[dict[str, str]]
    figures: dict[str, float]


@dataclass(frozen=True)
class Seen:
    """The held-out images and what the new model says of them. truth: int64 [N]; pixels: uint8 [N,
    H, W, 3], None for a probe.
    """

    keys: list[str]
    truth: np.ndarray
    judged: Judged
    pixels: np.ndarray | None


def write(told: Told, module: Any | None, head: Head | None, seen: Seen | None) -> None:
    """Every file of OUT, vision_config.json last: with it the directory is a checkpoint. module: of
    transformers. Raises StorageError.
    """
    from safetensors import SafetensorError

    try:
        with tempfile.TemporaryDirectory(prefix="vitray-") as folder:
            if module is not None:
                _checkpoint(folder, module, told.found)
            if head is not None:
                write_head(folder, head)
            _text(folder, "README.md", _card(told, module is not None))
            _text(
                folder,
                "metrics.jsonl",
                "".join(json.dumps(record) + "\n" for record in told.records),
            )
            _text(folder, "skipped.json", json.dumps(told.skipped, indent=1))
            _text(
                folder,
                "report.html",
                page_of(told.config, told.classes, told.records, told.skipped, seen),
            )
            _events(folder, told.records)
            store_for(told.config.out).delete_tree(
                join(absolute(told.config.out), "tensorboard")
            )  # of a call that died here
            _send(folder, absolute(told.config.out))
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: {one_line(error)}. Free some space there, then run again."
        ) from error


def _checkpoint(folder: str, module: Any, found: Checkpoint) -> None:
    module.config._name_or_path = ""  # of a local model it would be a path of this machine
    with quiet():
        module.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    for name in FILES:
        if os.path.isfile(path := os.path.join(found.directory, name)):
            shutil.copyfile(path, os.path.join(folder, name))


def _text(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def _events(folder: str, records: list[dict[str, float]]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard events: pip install 'vitray[finetune]'")
        return
    with SummaryWriter(os.path.join(folder, "tensorboard")) as writer:
        for n, record in enumerate(records):
            step = int(record.get("step", n))
            for name in record.keys() - {"step", "epoch"}:
                writer.add_scalar(name, record[name], step, time.time())


def _send(folder: str, out: str) -> None:
    paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
    for path in sorted(paths, key=lambda path: (path == os.path.join(folder, "config.json"), path)):
        with open(path, "rb") as file:
            url = join(out, os.path.relpath(path, folder))
            store_for(url).replace(url, file.read())


def _card(told: Told, is_model: bool) -> str:
    """README.md of the model. Neither source nor a local path is in it: cards are for others."""
    config, base = told.config, told.found.model if told.found.revision else None
    versions = package_versions()
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-classification",
        "tags: [vitray]",
    ]
    head += [f"base_model: {json.dumps(base)}"] if base else []
    lines = [*head, "---", "", f"# An image classifier of {len(told.classes)} classes", ""]
    what = {"probe": "a linear probe of stored embeddings", "head": "its head", "full": "all of it"}
    what |= {"last": f"its last {config.last} blocks and its head"}
    what |= {"lora": f"low-rank adapters (rank {config.rank}, merged) and its head"}
    begun = ", from random weights" if config.init == "scratch" else ""
    lines += [f"Trained by vitray {versions['vitray']}: {what[config.train]}{begun}."]
    is_taught = bool(config.teacher or config.teacher_model)
    if is_taught:
        learnt = "scores" if config.distill == "labels" else "embeddings"
        lines += [
            f"It learnt the {learnt} of a teacher, with a weight of {config.teacher_weight:g} "
            f"beside the labels."
        ]
    if config.from_dataset and config.label_column == "label" and not config.label_table:
        lines += [
            "Its labels are what another model said: the figures tell how well it agrees with "
            "that one."
        ]
    lines += (
        []
        if is_model
        else [
            "",
            "This is a head alone, for vitray's `head:`. It reads an embedding of its backbone.",
        ]
    )
    if told.figures:
        lines += ["", "| held-out images | |", "| --- | --- |"]
        lines += [
            f"| {name.removeprefix('validation_')} | {value:.4f} |"
            for name, value in told.figures.items()
        ]
    lines += ["", "## Classes", "", ", ".join(map(_plain, told.classes[:1000])), "", "## How", ""]
    private = {
        "source",
        "dataset",
        "teacher",
        "teacher_model",
        "model",
        "out",
        "label_table",
        "allow",
        "classes",
    }
    private |= set() if is_taught else TEACHER_FIELDS
    lines += [
        f"- {name}: {json.dumps(value)}"
        for name, value in config.deciding().items()
        if name not in private
    ]
    lines += [f"- base: {told.found.model} at {told.found.revision}"] if base else []
    return "\n".join(
        [*lines, f"- versions: {', '.join(f'{name} {versions[name]}' for name in PACKAGES)}", ""]
    )


def _plain(name: str) -> str:
    """A class's name, so that neither Markdown nor HTML obeys it, and without control
    characters.
    """
    said = (c if c.isprintable() else "?" for c in name[:100])
    return "".join(
        html.escape(c)
        if c in "<>&"
        else f"\\{c}"
        if c in string.punctuation and c not in "_.,-'"
        else c
        for c in said
    )
