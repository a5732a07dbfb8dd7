"""A stand-in for a model on a GPU, which costs no CPU: with it, only the pipeline is timed.

Its pixels and outputs are those of ViT-B/16. Imports numpy alone, so workers start in a second.
"""

from __future__ import annotations

import hashlib
import threading
import time
from typing import Any

import numpy as np

from vitray.models.types import Predictions
from vitray.schema import ModelOutputs, ModelSpec, PixelSpec, VectorColumn
from vitray.totals import predicted_images

FREE_ENGINE = "free"
LABELS = tuple(f"class {number:03d}" for number in range(1000))
BILINEAR = 2  # Pillow's number
BATCH_SIZE = 64  # so that a fragment has 256 images, and a few shards keep all cores busy


def free_spec(microseconds: int) -> ModelSpec:
    """The spec of a model that waits so many microseconds per image."""
    model = f"{FREE_ENGINE}:{microseconds}"
    return ModelSpec(
        model=model,
        revision=None,
        weights_sha256=hashlib.sha256(model.encode()).hexdigest(),
        family="vit",
        labels=LABELS,
        multi_label=False,
        dimension=768,
        layers=12,
        prefix_tokens=1,
        has_cls=True,
        pixels=PixelSpec(
            size=(224, 224),
            resample=BILINEAR,
            crop=None,
            rescale=1 / 255,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        precision="bf16",
        engine=FREE_ENGINE,
        batch_size=BATCH_SIZE,
    )


class FreeModel:
    """Gives every image the same labels, and vectors of noise, after the wait of its spec.

    Like a GPU it computes one batch at a time, so threads wait for each other. The vectors are
    drawn once and handed out as views: noise, because Parquet compresses a constant to nothing.
    """

    def __init__(self, spec: ModelSpec, outputs: ModelOutputs) -> None:
        self._wait_s = int(spec.model.partition(":")[2]) / 1e6
        self._outputs = outputs
        self._lock = threading.Lock()
        self._vectors = {column.column: _noise(column, 0) for column in outputs.vectors}

    def predict(self, pixels: Any) -> Predictions:
        """The labels and vectors of any number of images; the pixels are not read."""
        images = len(pixels)
        predicted_images.add(images)
        with self._lock:
            if self._wait_s:
                time.sleep(images * self._wait_s)
            vectors = {
                column.column: self._rows_of(column, images) for column in self._outputs.vectors
            }
        top_k = self._outputs.top_k
        if not top_k:
            return Predictions(None, None, vectors)
        ids = np.broadcast_to(np.arange(top_k, dtype=np.int32), (images, top_k))
        scores = np.broadcast_to(_scores(top_k), (images, top_k))
        return Predictions(ids, scores, vectors)

    def _rows_of(self, column: VectorColumn, images: int) -> np.ndarray:
        if images > len(self._vectors[column.column]):
            self._vectors[column.column] = _noise(column, max(images, BATCH_SIZE))
        return self._vectors[column.column][:images]


def _noise(column: VectorColumn, images: int) -> np.ndarray:
    """[images, D] of about unit length, in the column's type."""
    rows = np.random.default_rng(0).standard_normal((images, column.dimension), dtype=np.float32)
    rows /= column.dimension**0.5
    return rows.astype(column.dtype)


def _scores(top_k: int) -> np.ndarray:
    """float32 [top_k], falling, with a sum below 1."""
    return np.exp2(-np.arange(1, top_k + 1, dtype=np.float32))
