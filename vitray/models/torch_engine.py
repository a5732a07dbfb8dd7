"""The torch engine: cuts images into batches, runs the forward pass (compiled or not) and gathers what it says.

Imported only when a model is opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from vitray.errors import ModelError
from vitray.models import Predictions
from vitray.models.answers import check_pixels, gather
from vitray.models.blocks import pack
from vitray.models.checkpoint import cache_directory
from vitray.models.cutting import PADDING, cut, ladder, share
from vitray.models.forward import DTYPES, Forward
from vitray.models.loading import Network
from vitray.schema import ModelFacts, VectorColumn

CACHE = "TORCHINDUCTOR_CACHE_DIR"
log = logging.getLogger(__name__)


class TorchModel:
    """Model over a Network in facts.precision. Halves its batch, for good, when the device's memory is too small."""

    def __init__(
        self,
        network: Network,
        facts: ModelFacts,
        vectors: list[VectorColumn],
        top_k: int,
        device: str,
        workers: int = 1,
        compiled: bool = False,
    ) -> None:
        self._facts, self._vectors, self._device = facts, vectors, torch.device(device)
        self._k = min(top_k, len(facts.labels))
        if facts.precision == "fp32" and device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution: 10 bits of mantissa otherwise
        self._forward = Forward(network, facts, vectors, self._k, self._device)
        self._sizes: tuple[int, ...] = (facts.batch_size,)
        self._workers = workers
        self._map: Callable[..., Iterable[list[Any] | None]] = map
        if device == "cpu":
            # A thread a batch, and not threads within it: they would wait for each other after every layer, for long where
            # decoders share the cores. Two cores and ViT-Tiny beside two decoders: 105 -> FIGURE images/s.
            torch.set_num_threads(1)
            self._map = ThreadPoolExecutor(workers, "vitray-predict").map
        self._compiled: dict[int, Any] = {}  # by batch size; other sizes run uncompiled
        if compiled:
            self._compile()
        if not self._compiled and device == "cpu":
            pack(network.blocks, DTYPES[facts.precision])

    def _compile(self) -> None:
        """Every size of the ladder, now: none is compiled later. Where that fails all sizes run uncompiled."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        if os.environ.setdefault(CACHE, default_cache_dir()) == default_cache_dir():  # in /tmp, where others may write
            os.environ[CACHE] = cache_directory("compiled")
        self._sizes = ladder(self._facts.batch_size)
        self._compiled = dict.fromkeys(self._sizes, torch.compile(self._forward, dynamic=False))
        # Freezing lays the weights out for oneDNN; it must be on while dynamo traces, so `options=` would not do. The joint
        # passes turn `Attention`'s matmuls back into the slower fused kernel.
        on_cpu = {"freezing": True, "use_joint_graph_passes": False} if self._device.type == "cpu" else {}
        try:
            with torch._inductor.config.patch(on_cpu):
                for size in self._compiled:
                    if self._run_if_it_fits(np.zeros((size, *self._facts.pixels.shape, 3), np.uint8), size) is None:
                        self._step_down()
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            log.warning(
                "%s runs uncompiled, torch.compile failed: %s. Install g++ or set compile: off", self._facts.model, reason
            )
            self._sizes, self._compiled = (self._facts.batch_size,), {}

    def predict(self, pixels: np.ndarray) -> Predictions:
        """Labels and embeddings, batch by batch.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size. Raises ModelError for another shape, for results that
        are not finite in this precision, and when not even one image fits the device.
        """
        check_pixels(self._facts, pixels)
        parts, done = list[list[Any]](), 0
        while done < len(pixels):
            sizes = self._cut(len(pixels) - done)
            ends = list(accumulate(sizes, initial=done))
            for part in self._map(self._run_if_it_fits, [pixels[start : start + n] for start, n in zip(ends, sizes)], sizes):
                if part is None:
                    self._step_down()
                    break
                parts.append(part)
                done += len(part[0])
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts)]
        return gather(self._facts, self._vectors, self._k, columns)

    def _cut(self, images: int) -> list[int]:
        """Batch sizes. Where no size is compiled every worker gets as much as the others."""
        if self._compiled or self._workers == 1:
            return cut(images, self._sizes, PADDING if self._compiled else 0.0)
        return share(images, self._sizes[0], self._workers)

    def _run_if_it_fits(self, batch: np.ndarray, size: int) -> list[Any] | None:
        """Scores, ids, then one tensor a vector column, all on the device; None when the memory does not suffice.

        size: how many images the pass is for; what the batch lacks is padded, and cut off the answer.
        """
        forward = self._compiled.get(size, self._forward)
        try:
            with torch.inference_mode():
                pixels = torch.from_numpy(np.require(batch, requirements=["C", "W"])).to(self._device)
                if len(batch) < size:
                    pixels = torch.cat([pixels, pixels[:1].expand(size - len(batch), -1, -1, -1)])
                return [column[: len(batch)] for column in forward(pixels)]
        except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU and MPS raise plain ones
            known = ("out of memory", "can't allocate memory")
            if isinstance(error, torch.OutOfMemoryError) or any(text in str(error).lower() for text in known):
                return None
            raise
        finally:
            self._forward.caught.tokens.clear()

    def _step_down(self) -> None:
        if self._sizes == (1,):
            raise ModelError(
                f"{self._facts.model} does not fit {self._device}: one image is too much for it. Use a larger device."
            )
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()
        batch = self._sizes[0]
        if batch == self._facts.batch_size:
            log.warning("%s: out of memory with %d images at once, halving; set batch_size lower", self._facts.model, batch)
        self._sizes = self._sizes[1:] or (batch // 2,)
