"""The files of a finished training: checkpoint, model card, metrics, TensorBoard events, page."""

from __future__ import annotations

import html
import json
import logging
import os
import shutil
import string
import tempfile
import time
from typing import Any

from vitray.dataset import package_versions
from vitray.errors import StorageError, count, one_line
from vitray.models.checkpoint import Checkpoint, quiet
from vitray.models.linear_head import Head, write_head
from vitray.models.pixels import FILES
from vitray.storage import absolute, join, store_for
from vitray.training.config import TEACHER_FIELDS, TrainingConfig
from vitray.training.outcome import TrainingOutcome
from vitray.training.page import page_of

log = logging.getLogger(__name__)
SHARD_BYTES = "2GB"  # of weights in one file: S3 takes at most 5 GB at once
PACKAGES = ("vitray", "torch", "transformers")  # whose versions the card names
MOST_CLASSES = 1000  # that the card names
NAME_CHARS = 100  # of a class in the card
# fields that a card leaves out: it may be published
PRIVATE_FIELDS = {
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
MARKDOWN_SAFE = "_.,-'"  # punctuation that needs no escape


def write(outcome: TrainingOutcome, module: Any | None, head: Head | None) -> None:
    """Write every file of OUT, config.json last: with it the directory is a checkpoint.

    module: of transformers. Raises StorageError.
    """
    from safetensors import SafetensorError

    out = absolute(outcome.config.out)
    try:
        with tempfile.TemporaryDirectory(prefix="vitray-") as folder:
            if module is not None:
                _write_checkpoint(folder, module, outcome.base)
            if head is not None:
                write_head(folder, head)
            metrics = "".join(json.dumps(record) + "\n" for record in outcome.records)
            _write_text(folder, "README.md", _card(outcome, module is not None))
            _write_text(folder, "metrics.jsonl", metrics)
            _write_text(folder, "skipped.json", json.dumps(outcome.skipped, indent=1))
            _write_text(folder, "report.html", page_of(outcome))
            _write_events(folder, outcome.records)
            # of an earlier call that died here: TensorBoard would show its events, too
            store_for(out).delete_tree(join(out, "tensorboard"))
            _upload(folder, out)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: {one_line(error)}. Free some space there, then run again."
        ) from error


def _write_checkpoint(folder: str, module: Any, base: Checkpoint) -> None:
    module.config._name_or_path = ""  # of a local model it would be a path of this machine
    with quiet():
        module.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    for name in FILES:
        path = os.path.join(base.directory, name)
        if os.path.isfile(path):
            shutil.copyfile(path, os.path.join(folder, name))


def _write_text(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def _write_events(folder: str, records: list[dict[str, float]]) -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard events: pip install 'vitray[finetune]'")
        return
    with SummaryWriter(os.path.join(folder, "tensorboard")) as writer:
        for number, record in enumerate(records):
            step = int(record.get("step", number))
            for name in record.keys() - {"step", "epoch"}:
                writer.add_scalar(name, record[name], step, time.time())


def _upload(folder: str, out: str) -> None:
    """Copy the folder's files to OUT, config.json last."""
    paths = [
        os.path.join(directory, name) for directory, _, names in os.walk(folder) for name in names
    ]
    config = os.path.join(folder, "config.json")
    for path in sorted(paths, key=lambda path: (path == config, path)):
        with open(path, "rb") as file:
            url = join(out, os.path.relpath(path, folder))
            store_for(url).replace(url, file.read())


def _card(outcome: TrainingOutcome, is_model: bool) -> str:
    """README.md of the model. It names no source and no local path: other people may read it."""
    base = outcome.base.model if outcome.base.revision else None
    versions = package_versions()
    metadata = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-classification",
        "tags: [vitray]",
    ]
    if base:
        metadata.append(f"base_model: {json.dumps(base)}")
    lines = [
        *metadata,
        "---",
        "",
        f"# An image classifier of {count(len(outcome.classes), 'class')}",
        "",
    ]
    lines.append(f"Trained by vitray {versions['vitray']}: {_what_learnt(outcome.config)}.")
    lines += _card_notes(outcome.config)
    if not is_model:
        lines += [
            "",
            "This is only a head, for vitray's `head:`. It reads its backbone's embeddings.",
        ]
    if outcome.figures:
        lines += ["", "| held-out images | |", "| --- | --- |"]
        for name, value in outcome.figures.items():
            lines.append(f"| {name.removeprefix('validation_')} | {value:.4f} |")
    names = ", ".join(_escaped(name) for name in outcome.classes[:MOST_CLASSES])
    lines += ["", "## Classes", "", names, "", "## How", "", *_card_fields(outcome.config)]
    if base:
        lines.append(f"- base: {base} at {outcome.base.revision}")
    lines.append(f"- versions: {', '.join(f'{name} {versions[name]}' for name in PACKAGES)}")
    return "\n".join([*lines, ""])


def _what_learnt(config: TrainingConfig) -> str:
    what = {
        "probe": "a linear probe of stored embeddings",
        "head": "its head",
        "last": f"its last {count(config.last, 'block')} and its head",
        "lora": f"low-rank adapters (rank {config.rank}, merged) and its head",
        "full": "all of it",
    }
    return what[config.train] + (", from random weights" if config.init == "scratch" else "")


def _card_notes(config: TrainingConfig) -> list[str]:
    notes: list[str] = []
    if config.teacher or config.teacher_model:
        learnt = "scores" if config.distill == "labels" else "embeddings"
        notes.append(
            f"It learnt the {learnt} of a teacher, "
            f"with a weight of {config.teacher_weight:g} beside the labels."
        )
    if config.from_dataset and config.label_column == "label" and not config.label_table:
        notes.append(
            "Its labels are another model's: the figures are its agreement with that model."
        )
    return notes


def _card_fields(config: TrainingConfig) -> list[str]:
    is_taught = bool(config.teacher or config.teacher_model)
    left_out = PRIVATE_FIELDS if is_taught else PRIVATE_FIELDS | TEACHER_FIELDS
    return [
        f"- {name}: {json.dumps(value)}"
        for name, value in config.deciding().items()
        if name not in left_out
    ]


def _escaped(name: str) -> str:
    """A class's name, so that it is neither Markdown nor HTML, without control characters."""
    return "".join(_escaped_character(character) for character in name[:NAME_CHARS])


def _escaped_character(character: str) -> str:
    if not character.isprintable():
        return "\\?"
    if character in "<>&":
        return html.escape(character)
    if character in string.punctuation and character not in MARKDOWN_SAFE:
        return f"\\{character}"
    return character
