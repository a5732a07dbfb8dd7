"""The forward pass as a graph for other engines than torch: exported once, run batch by batch.

Imports torch.
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

from vitray.models.batching import check_pixels, gather, share
from vitray.models.forward import Forward
from vitray.models.loading import Network
from vitray.models.types import Predictions
from vitray.schema import ModelOutputs, ModelSpec
from vitray.totals import copied_bytes, predicted_images
from vitray.vectors import top_k

# uint8 [n, H, W, 3], n >= 1, to the graph's results; by several threads at once
Run = Callable[[np.ndarray], list[np.ndarray]]


def export_graph(
    network: Network, spec: ModelSpec, outputs: ModelOutputs, fixed: torch.Tensor | None = None
) -> Any:
    """torch's ExportedProgram: pixels [images, H, W, 3] to scores [images, C], then the vectors.

    Scores are those of all labels; there are none where outputs.top_k is 0. Weights and arithmetic
    are float32. fixed: pixels whose type and number of images are the only ones that the program
    takes; else it takes any number of uint8 images.
    """
    exact = replace(spec, precision="fp32")
    forward = Forward(network, exact, outputs, torch.device("cpu"), ranks=False)
    program = _WithoutEmptyResults(forward, has_scores=outputs.top_k > 0)
    pixels = torch.zeros(2, *spec.pixels.shape, 3, dtype=torch.uint8) if fixed is None else fixed
    shapes = ({0: torch.export.Dim("images")},) if fixed is None else None
    with torch.no_grad(), without_warnings():
        return torch.export.export(program, (pixels,), dynamic_shapes=shapes, strict=False)


@contextmanager
def without_warnings() -> Iterator[None]:
    """A block without the FutureWarnings that torch gives about itself during an export."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class GraphModel:
    """A Model over a function that runs such a graph."""

    def __init__(self, run: Run, spec: ModelSpec, outputs: ModelOutputs, workers: int) -> None:
        self._run = run
        self._spec = spec
        self._outputs = outputs.limited_to(len(spec.labels))
        self._workers = workers
        self._map = ThreadPoolExecutor(workers, "vitray-predict").map

    def predict(self, pixels: np.ndarray) -> Predictions:
        """Labels and embeddings, batch by batch, without padding.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. Raises ModelError for another
        shape and for results that are not finite.
        """
        check_pixels(self._spec, pixels)
        sizes = share(len(pixels), self._spec.batch_size, self._workers)
        starts = accumulate(sizes, initial=0)
        if not pixels.flags.c_contiguous:
            pixels = np.ascontiguousarray(pixels)
            copied_bytes.add(pixels.nbytes)
        batches = [pixels[start : start + n] for start, n in zip(starts, sizes)]
        parts = []
        for size, part in zip(sizes, self._map(self._run, batches)):
            predicted_images.add(size)
            parts.append(part)
        results = [np.concatenate(column) for column in zip(*parts)]
        if not results:
            return gather(self._spec, self._outputs, [])
        if self._outputs.top_k:
            scores, ids = top_k(results[0], self._outputs.top_k)
            return gather(self._spec, self._outputs, [scores, ids, *results[1:]])
        empty = np.empty((len(pixels), 0), np.float32)
        return gather(self._spec, self._outputs, [empty, empty, *results])


class _WithoutEmptyResults(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Forward's results without the empty ones: all scores if there are any, then the vectors."""

    def __init__(self, forward: Forward, has_scores: bool) -> None:
        super().__init__()
        self._whole = forward  # this name is in the exported file, and so in its sha256
        self._has_scores = has_scores

    def forward(self, pixels: Any) -> tuple[Any, ...]:
        scores, _, *vectors = self._whole(pixels)
        return (scores, *vectors) if self._has_scores else tuple(vectors)
