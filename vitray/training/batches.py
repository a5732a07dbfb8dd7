"""Batches: images of a step, cropped, mirrored and mixed, with their targets.

All of it follows from (seed, epoch, step) and the position in the step. So a resumed run continues
with the same batches, and workers that share a step see the images that one worker would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vitray.errors import JobError, count
from vitray.schema import PixelSpec
from vitray.training.config import TrainingConfig
from vitray.training.examples import Examples
from vitray.training.teachers import OnlineTeacher, StoredTeacher, normalised

ASPECT = 4 / 3  # widest crop; the narrowest is 3 / 4. Source: Szegedy et al. 2015


@dataclass(frozen=True)
class Batch:
    """A worker's images of a step.

    pixels: float32 [n, 3, H, W], normalised. target: float32 [n, C], rows of sum 1.
    teacher_target: float32 [n, C] or [n, D] of a StoredTeacher; an OnlineTeacher computes it later.
    has_teacher: bool [n], whether the teacher has seen the image.
    """

    pixels: Any
    target: Any
    teacher_target: Any
    has_teacher: Any

    def mixed(self, partner: Batch, share: float) -> Batch:
        """`share` of this batch and the rest of its partner, image by image (mixup)."""

        def mix(one: Any, two: Any) -> Any:
            return share * one + (1 - share) * two

        return Batch(
            mix(self.pixels, partner.pixels),
            mix(self.target, partner.target),
            mix(self.teacher_target, partner.teacher_target),
            self.has_teacher & partner.has_teacher,
        )


@dataclass(frozen=True)
class Batches:
    """The batches of a config over its training images. world: workers that share a step."""

    config: TrainingConfig
    examples: Examples
    pixels: PixelSpec
    classes: int
    teacher: StoredTeacher | OnlineTeacher | None
    world: int = 1

    @property
    def size(self) -> int:
        """Images per step, of all workers. Raises JobError for too few images.

        An epoch leaves out the images that do not fill a step; the next one has another order.
        """
        images = len(self.examples.ids)
        parts = self.config.workers * self.config.accumulate
        size = min(self.config.batch_size, images // parts * parts)
        if size == 0:
            raise JobError(
                f"{count(images, 'image')} cannot be divided into {count(parts, 'part')} of a "
                "step. Set fewer workers or `accumulate`."
            )
        return size

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return len(self.examples.ids) // self.size

    def batch(self, epoch: int, step: int, rank: int = 0) -> Batch:
        """A worker's share of a step."""
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.examples.ids))
        images = order[step * self.size : (step + 1) * self.size]
        rng = np.random.default_rng([self.config.seed, epoch, step])
        views = self._views(rng)
        share = float(rng.beta(self.config.mixup, self.config.mixup)) if self.config.mixup else 1.0
        own = np.arange(rank, self.size, self.world)
        batch = self._augmented(images[own], views[own])
        if share == 1:
            return batch
        return batch.mixed(self._augmented(images[::-1][own], views[::-1][own]), share)

    def _views(self, rng: np.random.Generator) -> np.ndarray:
        """float32 [B, 2, 3]: the crop of each image, as affine_grid takes it."""
        count = self.size
        area = rng.uniform(self.config.crop, 1, count)
        ratio = np.exp(rng.uniform(-np.log(ASPECT), np.log(ASPECT), count))
        if self.config.crop == 1:
            ratio = np.ones(count)
        width = np.minimum(np.sqrt(area * ratio), 1)
        height = np.minimum(np.sqrt(area / ratio), 1)
        right = (1 - width) * rng.uniform(-1, 1, count)
        down = (1 - height) * rng.uniform(-1, 1, count)
        mirror = np.where(rng.random(count) < 0.5, -1, 1) if self.config.flip else np.ones(count)
        zero = np.zeros(count)
        rows = [
            np.stack([width * mirror, zero, right], 1),
            np.stack([zero, height, down], 1),
        ]
        return np.stack(rows, 1).astype(np.float32)

    def _augmented(self, images: np.ndarray, views: np.ndarray) -> Batch:
        """images: int64 [n], indices of the examples."""
        raw = torch.from_numpy(self.examples.pixels[images]).permute(0, 3, 1, 2).float()
        pixels = normalised(self._cropped(raw, views), self.pixels)
        ids = torch.from_numpy(self.examples.ids[images])
        smoothing = self.config.label_smoothing
        target = functional.one_hot(ids, self.classes).float() * (1 - smoothing)
        target = target + smoothing / self.classes
        if isinstance(self.teacher, StoredTeacher):
            has_teacher = torch.from_numpy(self.teacher.rows[images] >= 0)
            return Batch(pixels, target, torch.from_numpy(self.teacher.of(images)), has_teacher)
        has_teacher = torch.full((len(images),), self.teacher is not None)
        return Batch(pixels, target, torch.zeros(len(images), 0), has_teacher)

    def _cropped(self, pixels: Any, views: np.ndarray) -> Any:
        """float32 [n, 3, H, W] of the model's size; without crops only mirrored, and exact."""
        if self.config.crop == 1:
            is_mirrored = torch.from_numpy(views[:, :1, :1, None] < 0)
            return torch.where(is_mirrored, pixels.flip(3), pixels)
        shape = [len(pixels), 3, *self.pixels.shape]
        grid = functional.affine_grid(torch.from_numpy(views), shape, align_corners=False)
        return functional.grid_sample(
            pixels, grid, mode="bilinear", padding_mode="border", align_corners=False
        )
