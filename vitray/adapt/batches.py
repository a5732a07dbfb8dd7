"""Batches: which images, how they are cropped, mirrored and mixed, and what is wanted of them.

All of it follows from (seed, epoch, step) and an image's place in the step, so that a resumed run goes on with the same batches, and
workers that share a step see together what one alone would see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vitray.adapt.examples import Examples
from vitray.adapt.recipe import Recipe
from vitray.dataset import Dataset, choose_vector, matrix_of, read
from vitray.errors import JobError
from vitray.schema import PixelSpec

ASPECT = 4 / 3  # widest and, upside down, narrowest crop. Source: Szegedy et al. 2015


@dataclass(frozen=True)
class Batch:
    """pixels: float32 [n, 3, H, W], normalised. target: float32 [n, C], rows of sum 1.

    taught: float32 [n, C] or [n, D] of the teacher; known: bool [n], whether it has seen the image.
    """

    pixels: Any
    target: Any
    taught: Any
    known: Any


class Teaching:
    """What a teacher's dataset says of each training image, found by the hash of its bytes."""

    def __init__(self, recipe: Recipe, dataset: Dataset, hashes: list[bytes], classes: tuple[str, ...]) -> None:
        """Raises JobError when it has none of the images, or not the classes."""
        self.size, self.ids = len(classes), None
        names = ["top_ids", "top_scores"] if recipe.distill == "labels" else [choose_vector(dataset, recipe.column).column]
        if recipe.distill == "labels" and dataset.facts.multi_label:
            raise JobError(f"{dataset.out} has scores of independent classes, which are no distribution. Set distill: embedding.")
        table = read(dataset.out, ["content_hash", *names])
        at = {value: n for n, value in enumerate(table["content_hash"].to_pylist())}
        self.rows = np.array([at.get(value, -1) for value in hashes], np.int64)
        if (self.rows < 0).all():
            raise JobError(f"teacher {dataset.out} has seen none of these images (by their bytes). Run its job on them first.")
        if recipe.distill == "embedding":
            self.values = matrix_of(table[names[0]])
            self.size = self.values.shape[1]
            return
        places = {name: n for n, name in enumerate(classes)}
        if lost := [name for name in dataset.facts.labels if name not in places]:
            raise JobError(
                f"the teacher's class {lost[0]} is not among `classes`. Name all of the teacher's, or leave `classes` out."
            )
        to = np.array([places[name] for name in dataset.facts.labels])
        k = len(table["top_ids"][0])
        self.ids = to[table["top_ids"].combine_chunks().flatten().to_numpy().reshape(-1, k)]
        self.values = table["top_scores"].combine_chunks().flatten().to_numpy().reshape(-1, k)

    def of(self, places: np.ndarray) -> np.ndarray:
        """float32 [n, C]: the top scores, what they leave of 1 spread over the other classes; or float32 [n, D]."""
        rows = self.rows[places]
        values: np.ndarray = self.values[rows].astype(np.float32)
        if self.ids is None:
            return values
        rest = np.clip(1 - values.sum(1, keepdims=True), 0, 1) / max(1, self.size - values.shape[1])
        dense = np.repeat(rest, self.size, 1).astype(np.float32)
        np.put_along_axis(dense, self.ids[rows], values, 1)
        return dense


@dataclass(frozen=True)
class Batches:
    """The batches of a recipe over its training images."""

    recipe: Recipe
    examples: Examples
    spec: PixelSpec
    classes: int
    teaching: Teaching | None
    world: int = 1  # workers that share a step

    @property
    def size(self) -> int:
        """Images a step, of all workers; what an epoch leaves over waits for the next one, whose order is another."""
        parts = self.recipe.workers * self.recipe.accumulate
        size = min(self.recipe.batch_size, len(self.examples.ids) // parts * parts)
        if not size:
            raise JobError(
                f"{len(self.examples.ids)} images are too few for {parts} parts of a step. Set fewer workers or `accumulate`."
            )
        return size

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return len(self.examples.ids) // self.size

    def batch(self, epoch: int, step: int, rank: int = 0) -> Batch:
        """What a worker sees of a step."""
        order = np.random.default_rng([self.recipe.seed, epoch]).permutation(len(self.examples.ids))
        places = order[step * self.size : (step + 1) * self.size]
        chance = np.random.default_rng([self.recipe.seed, epoch, step])
        views = self._views(chance)
        share = float(chance.beta(self.recipe.mixup, self.recipe.mixup)) if self.recipe.mixup else 1.0
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
        recipe, n = self.recipe, self.size
        area, ratio = chance.uniform(recipe.crop, 1, n), np.exp(chance.uniform(-np.log(ASPECT), np.log(ASPECT), n))
        if recipe.crop == 1:
            ratio = np.ones(n)
        width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        right, down = (1 - width) * chance.uniform(-1, 1, n), (1 - height) * chance.uniform(-1, 1, n)
        mirror = np.where(chance.random(n) < 0.5, -1, 1) if recipe.flip else np.ones(n)
        zero = np.zeros(n)
        return np.stack([np.stack([width * mirror, zero, right], 1), np.stack([zero, height, down], 1)], 1).astype(np.float32)

    def _seen(self, places: np.ndarray, views: np.ndarray) -> Batch:
        pixels = torch.from_numpy(self.examples.pixels[places]).permute(0, 3, 1, 2).float()
        if self.recipe.crop < 1:
            grid = functional.affine_grid(torch.from_numpy(views), [len(places), 3, *self.spec.shape], align_corners=False)
            pixels = functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
        else:  # mirrored exactly
            pixels = torch.where(torch.from_numpy(views[:, :1, :1, None] < 0), pixels.flip(3), pixels)
        target = functional.one_hot(torch.from_numpy(self.examples.ids[places]), self.classes).float()
        target = target * (1 - self.recipe.label_smoothing) + self.recipe.label_smoothing / self.classes
        if self.teaching is None:
            return Batch(
                normalised(pixels, self.spec), target, torch.zeros(len(places), 0), torch.zeros(len(places), dtype=torch.bool)
            )
        known = torch.from_numpy(self.teaching.rows[places] >= 0)
        return Batch(normalised(pixels, self.spec), target, torch.from_numpy(self.teaching.of(places)), known)


def normalised(pixels: Any, spec: PixelSpec) -> Any:
    """As the processor says. pixels: float [n, 3, H, W] of 0..255."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    return ((pixels * spec.rescale - mean) / std).contiguous()
