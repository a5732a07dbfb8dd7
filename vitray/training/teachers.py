"""What a teacher says of an image: its dataset, which was asked once, or the teacher itself, which
sees what the student sees.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from vitray.dataset import Dataset, choose_vector, matrix_of, read
from vitray.errors import JobError
from vitray.models.checkpoint import Checkpoint, read_config, read_labels
from vitray.models.loading import load_network
from vitray.models.pixels import read_pixels
from vitray.schema import PixelSpec
from vitray.training.config import TrainingConfig

log = logging.getLogger(__name__)


class Teaching:
    """What a teacher's dataset says of each training image, found by the hash of its bytes."""

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        hashes: list[bytes],
        classes: tuple[str, ...],
    ) -> None:
        """Raises JobError when it has none of the images, or not the classes."""
        self.size, self.ids = len(classes), None
        names = (
            ["top_ids", "top_scores"]
            if config.distill == "labels"
            else [choose_vector(dataset, config.column).column]
        )
        table = read(dataset.out, ["content_hash", *names])
        at = {value: n for n, value in enumerate(table["content_hash"].to_pylist())}
        self.rows = np.array([at.get(value, -1) for value in hashes], np.int64)
        if (self.rows < 0).all():
            raise JobError(
                f"teacher {dataset.out} has seen none of these images (by their bytes). Run its "
                f"job on them first."
            )
        if unknown := int((self.rows < 0).sum()):
            log.warning(
                "teacher %s has not seen %d of %d images: their labels alone teach them",
                dataset.out,
                unknown,
                len(hashes),
            )
        if config.distill == "embedding":
            self.values = matrix_of(table[names[0]])
            self.size = self.values.shape[1]
            return
        to = _places(dataset.spec.labels, classes)
        k = len(table["top_ids"][0])
        self.ids = to[table["top_ids"].combine_chunks().flatten().to_numpy().reshape(-1, k)]
        self.values = table["top_scores"].combine_chunks().flatten().to_numpy().reshape(-1, k)

    def of(self, places: np.ndarray) -> np.ndarray:
        """float32 [n, C]: the top scores, what they leave of 1 spread over the other classes; or
        float32 [n, D].
        """
        rows = self.rows[places]
        values: np.ndarray = self.values[rows].astype(np.float32)
        if self.ids is None:
            return values
        rest = np.clip(1 - values.sum(1, keepdims=True), 0, 1) / max(1, self.size - values.shape[1])
        dense = np.repeat(rest, self.size, 1).astype(np.float32)
        np.put_along_axis(dense, self.ids[rows], values, 1)
        return dense


class OnlineTeacher:
    """The teacher itself, asked about each crop and mixture: the student learns its function.
    Source: Beyer et al. 2022.
    """

    def __init__(
        self, config: TrainingConfig, found: Checkpoint, classes: tuple[str, ...], given: PixelSpec
    ) -> None:
        """given: how the student's pixels are normalised. Raises JobError when it has other
        classes.
        """
        vision_config, scores = read_config(found), config.distill == "labels"
        self.given, self.own = given, read_pixels(found, vision_config)
        self.places = _places(read_labels(found, vision_config), classes) if scores else None
        self.size = len(classes) if scores else vision_config.dimension
        self.network, self.has_cls = load_network(found, scores), vision_config.prefix_tokens > 0
        self.network.module.eval()

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not typed here
    def __call__(self, pixels: Any) -> Any:
        """float32 [n, C] scores, or [n, D] vectors. pixels: float32 [n, 3, H, W], the student's."""
        mean, std = _channels(pixels, self.given)
        pixels = normalised((pixels * std + mean) / self.given.rescale, self.own)
        if self.given.shape != self.own.shape:
            pixels = functional.interpolate(pixels, self.own.shape, mode="bilinear", antialias=True)
        answer = self.network.module.to(pixels.device)(pixel_values=pixels)  # moves once
        if self.places is None:
            return pooled(answer.last_hidden_state, self.network.final_norm, self.has_cls).float()
        scores = pixels.new_zeros(len(pixels), self.size)
        scores[:, self.places] = answer.logits.float().softmax(-1)
        return scores


def _places(labels: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """int64: where the teacher's classes are among these. Raises JobError."""
    places = {name: n for n, name in enumerate(classes)}
    if lost := [name for name in labels if name not in places]:
        raise JobError(
            f"the teacher's class {lost[0]} is not among `classes`. Name all of the teacher's, or "
            f"leave `classes` out."
        )
    return np.array([places[name] for name in labels])


def pooled(tokens: Any, final_norm: Any | None, has_cls: bool) -> Any:
    """float [n, D]: the CLS token after the final LayerNorm, or the mean where there is none.
    tokens: float [n, T, D].
    """
    tokens = tokens if final_norm is None else final_norm(tokens)
    return tokens[:, 0] if has_cls else tokens.mean(1)


def normalised(pixels: Any, spec: PixelSpec) -> Any:
    """As the processor says. pixels: float [n, 3, H, W] of 0..255."""
    mean, std = _channels(pixels, spec)
    return ((pixels * spec.rescale - mean) / std).contiguous()


def _channels(pixels: Any, spec: PixelSpec) -> tuple[Any, Any]:
    return pixels.new_tensor(spec.mean).view(1, 3, 1, 1), pixels.new_tensor(spec.std).view(
        1, 3, 1, 1
    )
