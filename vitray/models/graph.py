"""The forward pass as a graph for other engines than torch: exported once, run batch by batch. Imported only when one is opened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from vitray.models import Predictions
from vitray.models.answers import check_pixels, gather
from vitray.models.cutting import share
from vitray.models.forward import Forward
from vitray.models.loading import Network
from vitray.schema import ModelFacts, VectorColumn

Run = Callable[[np.ndarray], list[np.ndarray]]  # uint8 [n, H, W, 3], n >= 1, to the graph's results; by several threads at once


class GraphModel:
    """Model over a Network that `compile_graph`, of whatever engine, compiles as a graph of float32 weights and any batch size."""

    def __init__(
        self,
        network: Network,
        facts: ModelFacts,
        vectors: list[VectorColumn],
        top_k: int,
        workers: int,
        compile_graph: Callable[[Any], Run],
    ) -> None:
        self._facts, self._vectors, self._workers = facts, vectors, workers
        self._map = ThreadPoolExecutor(workers, "vitray-predict").map
        self._k = min(top_k, len(facts.labels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, of torch
            self._run = compile_graph(self._export(network))

    def _export(self, network: Network) -> Any:
        """torch's ExportedProgram."""
        whole = Forward(network, replace(self._facts, precision="fp32"), self._vectors, self._k, torch.device("cpu"))
        pixels = torch.zeros(2, *self._facts.pixels.shape, 3, dtype=torch.uint8)
        with torch.no_grad():
            return torch.export.export(
                _Asked(whole, self._k > 0), (pixels,), dynamic_shapes=({0: torch.export.Dim("images")},), strict=False
            )

    def predict(self, pixels: np.ndarray) -> Predictions:
        """Labels and embeddings, batch by batch, without padding.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. Raises ModelError for another shape and for results that
        are not finite.
        """
        check_pixels(self._facts, pixels)
        sizes = share(len(pixels), self._facts.batch_size, self._workers)
        starts = accumulate(sizes, initial=0)
        batches = [np.require(pixels[start : start + n], requirements=["C"]) for start, n in zip(starts, sizes)]
        parts = list(self._map(self._run, batches))
        columns = [np.concatenate(column) for column in zip(*parts)]
        if parts and not self._k:
            columns = [np.empty((len(pixels), 0)), np.empty((len(pixels), 0)), *columns]
        return gather(self._facts, self._vectors, self._k, columns)


class _Asked(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Forward's results without the empty ones: scores and ids if `labels`, then the vectors."""

    def __init__(self, whole: Forward, labels: bool) -> None:
        super().__init__()
        self._whole, self._first = whole, 0 if labels else 2

    def forward(self, pixels: Any) -> tuple[Any, ...]:
        return tuple(self._whole(pixels)[self._first :])
