"""What every engine offers: `Model`, and the `Predictions` that it returns. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Predictions:
    """The labels and embeddings of N images.

    ids: int32 [N, k], scores: float32 [N, k], best first; None where no labels are computed.
    vectors: by column name, float32 or float16 [N, D].
    """

    ids: np.ndarray | None
    scores: np.ndarray | None
    vectors: dict[str, np.ndarray]


class Model(Protocol):
    """An open model of any engine."""

    def predict(self, pixels: Any) -> Predictions:
        """The labels and embeddings of any number of images, 0 included.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. They are an array, or a tensor on
        the device after decoding there.
        """
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model runs.

    device: cuda, xpu, mps or cpu. workers: how many batches are computed at once.
    compiled: torch.compile the forward pass first.
    """

    device: str
    workers: int = 1
    compiled: bool = False
