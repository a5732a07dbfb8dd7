"""How a training went: its result, and what its card, its page and its metrics show."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vitray.errors import count
from vitray.evaluation.metrics import accuracy
from vitray.models.checkpoint import Checkpoint
from vitray.storage import absolute, join
from vitray.training.config import TrainingConfig

MOST_WRONG = 24
MOST_RIGHT = 12


@dataclass(frozen=True)
class Evaluation:
    """A network's best label for each labelled image, with its score, and the loss.

    ids: int64 [N]; scores, losses: float32 [N].
    """

    ids: np.ndarray
    scores: np.ndarray
    losses: np.ndarray

    def figures(self, truth: np.ndarray) -> dict[str, float]:
        """Mean loss and accuracy. truth: int64 [N]."""
        return {
            "validation_loss": float(self.losses.mean()),
            "validation_accuracy": accuracy(self.ids, truth),
        }


def merit(record: dict[str, float], metric: str) -> tuple[float, ...]:
    """Sorts figures by `metric`: larger is better. Of equal accuracies the smaller loss wins."""
    loss = -record["validation_loss"]
    return (record["validation_accuracy"], loss) if metric == "accuracy" else (loss,)


@dataclass(frozen=True)
class HeldOut:
    """The held-out images, and the new model's labels for them.

    truth: int64 [N]. pictures: of the images of `shown_images`, as data URLs by their number. An
    image that could not be read again has none.
    """

    keys: list[str]
    truth: np.ndarray
    evaluation: Evaluation
    pictures: Mapping[int, str]


@dataclass(frozen=True)
class ShownImages:
    """The held-out images that a page shows, by number: the worst mistakes, and right ones."""

    wrong: list[int]
    right: list[int]

    @property
    def all(self) -> list[int]:
        return [*self.wrong, *self.right]


def shown_images(truth: np.ndarray, evaluation: Evaluation) -> ShownImages:
    """The wrongly labelled images with the largest losses; right ones, evenly spread."""
    by_loss = np.argsort(-evaluation.losses, kind="stable")
    wrong = by_loss[evaluation.ids[by_loss] != truth[by_loss]]
    right = np.flatnonzero(evaluation.ids == truth)
    spread = np.linspace(0, len(right) - 1, min(MOST_RIGHT, len(right))).astype(int)
    return ShownImages(wrong[:MOST_WRONG].tolist(), right[spread].tolist())


def pictures_of_pixels(pixels: np.ndarray, numbers: list[int]) -> dict[int, str]:
    """The model's inputs as JPEGs in data URLs: no byte of the original files is in them.

    pixels: uint8 [N, H, W, 3]. numbers: of the images to show.
    """
    return {n: _jpeg(pixels[n]) for n in numbers}


def _jpeg(pixels: np.ndarray) -> str:
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")
    return "data:image/jpeg;base64," + b64encode(jpeg).decode()


@dataclass(frozen=True)
class TrainingResult:
    """What was trained.

    figures: of the chosen weights, on the held-out images. skipped: images that were not used.
    model: whether OUT is a checkpoint for `model:`; else it is a head for `head:`.
    """

    out: str
    train: str
    classes: int
    images: int
    held_out: int
    skipped: int
    epochs: int
    seconds: float
    figures: dict[str, float]
    model: bool

    def __str__(self) -> str:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.figures.items()
        )
        lines = [
            f"{self.out}: {self.train} on {count(self.images, 'image')} of "
            f"{count(self.classes, 'class')} in {self.seconds:.1f} s; "
            f"{figures or 'no figures: no image was held out'}"
        ]
        if self.skipped:
            path = join(self.out, "skipped.json")
            lines.append(f"skipped    {count(self.skipped, 'image')}, listed in {path}")
        if self.model:
            lines.append(f"use it     vitray run SOURCE --model {self.out} --out …")
        else:
            lines.append(f"use it     vitray relabel DATASET --head {self.out} --into …")
        lines.append(f"look       {join(self.out, 'report.html')}")
        return "\n".join(lines)


@dataclass(frozen=True)
class TrainingOutcome:
    """A finished training.

    base: the checkpoint that it started from. records: of its steps and epochs, or of the
    strengths of a linear probe, whose record is then `chosen`. figures: of the chosen weights, on
    the held-out images. notes: what the page lacks.
    """

    config: TrainingConfig
    base: Checkpoint
    classes: tuple[str, ...]
    records: list[dict[str, float]]
    skipped: list[dict[str, str]]
    figures: dict[str, float]
    held_out: HeldOut | None  # None: no image was held out
    chosen: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    def result(self, images: int, epochs: int, seconds: float, is_model: bool) -> TrainingResult:
        """The result of the command. images: those that were trained on."""
        return TrainingResult(
            out=absolute(self.config.out),
            train=self.config.train,
            classes=len(self.classes),
            images=images,
            held_out=len(self.held_out.truth) if self.held_out is not None else 0,
            skipped=len(self.skipped),
            epochs=epochs,
            seconds=seconds,
            figures=self.figures,
            model=is_model,
        )
