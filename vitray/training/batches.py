"""Batches: which images, how they are cropped, mirrored and mixed, and what is wanted of them.

All of it follows from (seed, epoch, step) and an image's place in the step, so that a resumed run
goes on with the same batches, and workers that share a step see together what one alone would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vitray.errors import JobError
from vitray.schema import PixelSpec
from vitray.training.config import TrainingConfig
from vitray.training.examples import Examples
from vitray.training.teachers import OnlineTeacher, Teaching, normalised

ASPECT = 4 / 3  # widest and, upside down, narrowest crop. Source: Szegedy et al. 2015


@dataclass(frozen=True)
class Batch:
    """pixels: float32 [n, 3, H, W], normalised. target: float32 [n, C], rows of sum 1.

    taught: float32 [n, C] or [n, D] of a Teaching; a OnlineTeacher is asked later. known: bool [n],
    whether the teacher knows the image.
    """

    pixels: Any
    target: Any
    taught: Any
    known: Any


@dataclass(frozen=True)
class Batches:
    """The batches of a config over its training images."""

    config: TrainingConfig
    examples: Examples
    spec: PixelSpec
    classes: int
    teaching: Teaching | OnlineTeacher | None
    world: int = 1  # workers that share a step

    @property
    def size(self) -> int:
        """Images a step, of all workers; what an epoch leaves over waits for the next one, whose
        order is another.
        """
        parts = self.config.workers * self.config.accumulate
        size = min(self.config.batch_size, len(self.examples.ids) // parts * parts)
        if not size:
            raise JobError(
                f"{len(self.examples.ids)} images are too few for {parts} parts of a step. Set "
                f"fewer workers or `accumulate`."
            )
        return size

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.examples.ids) // self.size

    def batch(self, epoch: int, step: int, rank: int = 0) -> Batch:
        """What a worker sees of a step."""
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.examples.ids))
        places = order[step * self.size : (step + 1) * self.size]
        chance = np.random.default_rng([self.config.seed, epoch, step])
        views = self._views(chance)
        share = (
            float(chance.beta(self.config.mixup, self.config.mixup)) if self.config.mixup else 1.0
        )
        mine = np.arange(rank, self.size, self.world)
        batch = self._seen(places[mine], views[mine])
        if share == 1:
            return batch
        partner = self._seen(places[::-1][mine], views[::-1][mine])

        def mix(one: Any, two: Any) -> Any:
            return share * one + (1 - share) * two

        pixels, target = mix(batch.pixels, partner.pixels), mix(batch.target, partner.target)
        return Batch(pixels, target, mix(batch.taught, partner.taught), batch.known & partner.known)

    def _views(self, chance: np.random.Generator) -> np.ndarray:
        """float32 [B, 2, 3]: where each image's crop lies, for affine_grid."""
        config, n = self.config, self.size
        area, ratio = (
            chance.uniform(config.crop, 1, n),
            np.exp(chance.uniform(-np.log(ASPECT), np.log(ASPECT), n)),
        )
        if config.crop == 1:
            ratio = np.ones(n)
        width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        right, down = (
            (1 - width) * chance.uniform(-1, 1, n),
            (1 - height) * chance.uniform(-1, 1, n),
        )
        mirror = np.where(chance.random(n) < 0.5, -1, 1) if config.flip else np.ones(n)
        zero = np.zeros(n)
        return np.stack(
            [np.stack([width * mirror, zero, right], 1), np.stack([zero, height, down], 1)], 1
        ).astype(np.float32)

    def _seen(self, places: np.ndarray, views: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.examples.pixels[places]).permute(0, 3, 1, 2).float()
        if self.config.crop < 1:
            grid = functional.affine_grid(
                torch.from_numpy(views), [len(places), 3, *self.spec.shape], align_corners=False
            )
            pixels = functional.grid_sample(
                pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
            )
        else:  # mirrored exactly
            pixels = torch.where(
                torch.from_numpy(views[:, :1, :1, None] < 0), pixels.flip(3), pixels
            )
        target = functional.one_hot(
            torch.from_numpy(self.examples.ids[places]), self.classes
        ).float()
        target = (
            target * (1 - self.config.label_smoothing) + self.config.label_smoothing / self.classes
        )
        if not isinstance(self.teaching, Teaching):
            asked = torch.full((len(places),), self.teaching is not None)
            return Batch(normalised(pixels, self.spec), target, torch.zeros(len(places), 0), asked)
        known = torch.from_numpy(self.teaching.rows[places] >= 0)
        return Batch(
            normalised(pixels, self.spec), target, torch.from_numpy(self.teaching.of(places)), known
        )
