"""How a training went: what its card, its page and its metrics show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitray.evaluation.metrics import accuracy
from vitray.models.checkpoint import Checkpoint
from vitray.training.config import TrainingConfig


@dataclass(frozen=True)
class Evaluation:
    """A network's answers for labelled images. ids: int64 [N]; scores, losses: float32 [N]."""

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
    """The held-out images and the new model's answers.

    truth: int64 [N]. pixels: uint8 [N, H, W, 3], None for a linear probe.
    """

    keys: list[str]
    truth: np.ndarray
    answers: Evaluation
    pixels: np.ndarray | None


@dataclass(frozen=True)
class Outcome:
    """A finished training.

    base: the checkpoint that it started from. records: of its steps and epochs, or of the
    strengths of a linear probe. figures: of the chosen weights, on the held-out images.
    """

    config: TrainingConfig
    base: Checkpoint
    classes: tuple[str, ...]
    records: list[dict[str, float]]
    skipped: list[dict[str, str]]
    figures: dict[str, float]
    held_out: HeldOut | None  # None: no image was held out
