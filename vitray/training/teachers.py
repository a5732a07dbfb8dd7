"""Teachers: a dataset with the teacher's scores and vectors, or the teacher model itself."""

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


class StoredTeacher:
    """The teacher's scores or vectors of each training image, found by the hash of its bytes.

    rows: int64 [N], the dataset's row of each training image, -1 if it has none.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        hashes: list[bytes],
        classes: tuple[str, ...],
    ) -> None:
        """Raises JobError if it has none of the images, or labels that are not among `classes`."""
        learns_vectors = config.distill == "embedding"
        names = ["top_ids", "top_scores"]
        if learns_vectors:
            names = [choose_vector(dataset, config.column).column]
        table = read(dataset.out, ["content_hash", *names])
        row_of = {value: n for n, value in enumerate(table["content_hash"].to_pylist())}
        self.rows = np.array([row_of.get(value, -1) for value in hashes], np.int64)
        self._require_images(dataset)
        self.ids: np.ndarray | None = None
        if learns_vectors:
            self.values = matrix_of(table[names[0]])
            self.size = self.values.shape[1]
            return
        top_k = len(table["top_ids"][0])
        top_ids = table["top_ids"].combine_chunks().flatten().to_numpy().reshape(-1, top_k)
        self.ids = _student_ids(dataset.spec.labels, classes)[top_ids]
        self.values = table["top_scores"].combine_chunks().flatten().to_numpy().reshape(-1, top_k)
        self.size = len(classes)

    def _require_images(self, dataset: Dataset) -> None:
        is_missing = self.rows < 0
        if is_missing.all():
            raise JobError(
                f"teacher {dataset.out} has none of these images (by their bytes). "
                "Run its job on them first."
            )
        if is_missing.any():
            log.warning(
                "teacher %s does not have %d of %d images: only their labels are learnt",
                dataset.out,
                is_missing.sum(),
                len(self.rows),
            )

    def of(self, images: np.ndarray) -> np.ndarray:
        """float32 [n, C] scores, or [n, D] vectors. images: int64 [n], of the training images.

        The stored top scores; what they leave of 1 is spread evenly over the other classes.
        """
        rows = self.rows[images]
        values: np.ndarray = self.values[rows].astype(np.float32)
        if self.ids is None:
            return values
        remainder = np.clip(1 - values.sum(1, keepdims=True), 0, 1)
        per_class = remainder / max(1, self.size - values.shape[1])
        scores = np.repeat(per_class, self.size, 1).astype(np.float32)
        np.put_along_axis(scores, self.ids[rows], values, 1)
        return scores


class OnlineTeacher:
    """The teacher model, run on each crop and mixture that the student sees.

    The student learns its function. Source: Beyer et al. 2022.
    """

    def __init__(
        self,
        config: TrainingConfig,
        checkpoint: Checkpoint,
        classes: tuple[str, ...],
        student_pixels: PixelSpec,
    ) -> None:
        """student_pixels: how its input is normalised.

        Raises JobError for labels that are not among `classes`.
        """
        vision_config = read_config(checkpoint)
        self.student_pixels = student_pixels
        self.pixels = read_pixels(checkpoint, vision_config)
        learns_scores = config.distill == "labels"
        self.ids: np.ndarray | None = None
        self.size = vision_config.dimension
        if learns_scores:
            self.ids = _student_ids(read_labels(checkpoint, vision_config), classes)
            self.size = len(classes)
        self.network = load_network(checkpoint, learns_scores)
        self.network.module.eval()
        self.has_cls = vision_config.prefix_tokens > 0

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not typed here
    def __call__(self, pixels: Any) -> Any:
        """float32 [n, C] scores, or [n, D] vectors. pixels: float32 [n, 3, H, W], the student's."""
        mean, std = _channels(pixels, self.student_pixels)
        raw = (pixels * std + mean) / self.student_pixels.rescale
        pixels = normalised(raw, self.pixels)
        if self.student_pixels.shape != self.pixels.shape:
            pixels = functional.interpolate(
                pixels, self.pixels.shape, mode="bilinear", antialias=True
            )
        output = self.network.module.to(pixels.device)(pixel_values=pixels)  # moves once
        if self.ids is None:
            return pooled(output.last_hidden_state, self.network.final_norm, self.has_cls).float()
        scores = pixels.new_zeros(len(pixels), self.size)
        scores[:, self.ids] = output.logits.float().softmax(-1)
        return scores


def _student_ids(labels: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """int64: the student's class of each label of the teacher. Raises JobError."""
    ids = {name: n for n, name in enumerate(classes)}
    missing = next((name for name in labels if name not in ids), None)
    if missing is not None:
        raise JobError(
            f"the teacher's class {missing} is not among `classes`. "
            "Name all of the teacher's, or leave `classes` out."
        )
    return np.array([ids[name] for name in labels])


def pooled(tokens: Any, final_norm: Any | None, has_cls: bool) -> Any:
    """float [n, D]: the CLS token after the final LayerNorm, or the mean if there is none.

    tokens: float [n, T, D].
    """
    tokens = tokens if final_norm is None else final_norm(tokens)
    return tokens[:, 0] if has_cls else tokens.mean(1)


def normalised(pixels: Any, spec: PixelSpec) -> Any:
    """float [n, 3, H, W] as the processor makes them, of pixels of 0..255."""
    mean, std = _channels(pixels, spec)
    return ((pixels * spec.rescale - mean) / std).contiguous()


def _channels(pixels: Any, spec: PixelSpec) -> tuple[Any, Any]:
    mean = pixels.new_tensor(spec.mean).view(1, 3, 1, 1)
    std = pixels.new_tensor(spec.std).view(1, 3, 1, 1)
    return mean, std
