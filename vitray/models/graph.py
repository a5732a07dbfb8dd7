"""The forward pass as a graph for other engines than torch: exported once, run batch by batch.
Imported only when one is opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from vitray.models import Predictions
from vitray.models.batching import share
from vitray.models.forward import WHOLE, Forward
from vitray.models.loading import Network
from vitray.models.postprocess import best, check_pixels, gather
from vitray.schema import ModelSpec, VectorColumn

Run = Callable[
    [np.ndarray], list[np.ndarray]
]  # uint8 [n, H, W, 3], n >= 1, to the graph's results; by several threads at once


def export_graph(
    network: Network,
    spec: ModelSpec,
    vectors: list[VectorColumn],
    labels: bool,
    fixed: torch.Tensor | None = None,
) -> Any:
    """torch's ExportedProgram: pixels [images, H, W, 3] to the scores of all labels [images, C] if
    `labels`, then the vectors.

    Weights and arithmetic are float32. fixed: pixels whose type and number of images are the only
    ones; else uint8, any number.
    """
    whole = Forward(
        network,
        replace(spec, precision="fp32"),
        vectors,
        WHOLE if labels else 0,
        torch.device("cpu"),
    )
    pixels = torch.zeros(2, *spec.pixels.shape, 3, dtype=torch.uint8) if fixed is None else fixed
    shapes = ({0: torch.export.Dim("images")},) if fixed is None else None
    with torch.no_grad(), without_warnings():
        return torch.export.export(
            _Asked(whole, labels), (pixels,), dynamic_shapes=shapes, strict=False
        )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without torch's FutureWarnings of torch, which a program's export and conversion give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class GraphModel:
    """Model over what runs such a graph, of whatever engine."""

    def __init__(
        self, run: Run, spec: ModelSpec, vectors: list[VectorColumn], top_k: int, workers: int
    ) -> None:
        self._run, self._spec, self._vectors, self._workers = run, spec, vectors, workers
        self._map = ThreadPoolExecutor(workers, "vitray-predict").map
        self._k = min(top_k, len(spec.labels))

    def predict(self, pixels: np.ndarray) -> Predictions:
        """Labels and embeddings, batch by batch, without padding.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. Raises ModelError for another
        shape and for results that are not finite.
        """
        check_pixels(self._spec, pixels)
        sizes = share(len(pixels), self._spec.batch_size, self._workers)
        starts = accumulate(sizes, initial=0)
        batches = [
            np.require(pixels[start : start + n], requirements=["C"])
            for start, n in zip(starts, sizes)
        ]
        columns = [np.concatenate(column) for column in zip(*self._map(self._run, batches))]
        if columns:
            nothing = np.empty((len(pixels), 0), np.float32)
            columns[: self._k > 0] = best(columns[0], self._k) if self._k else (nothing, nothing)
        return gather(self._spec, self._vectors, self._k, columns)


class _Asked(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Forward's results without the empty ones: all scores if `labels`, then the vectors."""

    def __init__(self, whole: Forward, labels: bool) -> None:
        super().__init__()
        self._whole, self._labels = whole, labels

    def forward(self, pixels: Any) -> tuple[Any, ...]:
        scores, _, *vectors = self._whole(pixels)
        return (scores, *vectors) if self._labels else tuple(vectors)
