"""What a training does at a moment, for those who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    """The parts of a training, in the words of its progress view."""

    STARTING = "starting"
    READING_MODEL = "reading the model"
    READING_SOURCE = "reading the source"
    DECODING = "decoding the images"
    OPENING_MODEL = "opening the model"
    TRAINING = "training"
    MEASURING = "measuring the held-out images"
    READING_VECTORS = "reading the embeddings"
    FITTING_HEAD = "fitting the linear probe"
    READING_PICTURES = "reading some images for the page"
    WRITING = "writing the checkpoint"


@dataclass(frozen=True, slots=True)
class Activity:
    """What a training does now.

    done, total: work of this phase, in images, bytes or parts; total is None while it is unknown.
    images: images that this phase has seen. detail: text that names what is worked on.
    """

    phase: Phase
    done: float = 0.0
    total: float | None = None
    images: int = 0
    detail: str = ""

    @property
    def share(self) -> float | None:
        """The part of the phase that is done, 0 to 1; None while that is unknown."""
        if not self.total:
            return None
        return min(1.0, max(0.0, self.done / self.total))


Watch = Callable[[Activity], None]


def unwatched(_activity: Activity) -> None:
    """A watch for callers that show no progress."""
