"""The torch engine: cuts images into batches, runs the forward pass (compiled or not) and gathers
what it says.

Imported only when a model is opened.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from vitray.errors import ModelError, one_line
from vitray.models import Predictions, fp8
from vitray.models.batching import PADDING, cut, ladder, share
from vitray.models.blocks import pack
from vitray.models.compile_cache import graphs_kept
from vitray.models.forward import DTYPES, Forward
from vitray.models.loading import Network
from vitray.models.pinned_buffers import CudaLanes, Ring
from vitray.models.postprocess import check_pixels, gather
from vitray.schema import ModelSpec, VectorColumn

log = logging.getLogger(__name__)


class TorchModel:
    """Model over a Network in spec.precision. Halves its batch, for good, when the device's memory
    is too small.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        vectors: list[VectorColumn],
        top_k: int,
        device: str,
        workers: int = 1,
        compiled: bool = False,
    ) -> None:
        self._spec, self._vectors, self._device = spec, vectors, torch.device(device)
        self._k = min(top_k, len(spec.labels))
        if spec.precision == "fp32" and device == "cuda":
            torch.backends.cudnn.allow_tf32 = (
                False  # the patch embedding is a convolution: 10 bits of mantissa otherwise
            )
        self._forward = Forward(network, spec, vectors, self._k, self._device)
        if spec.precision == "fp8":
            synthetic = fp8.synthetic(
                min(fp8.IMAGES, spec.batch_size), spec.pixels.shape, self._device
            )
            self.agreement = fp8.quantise(self._forward, network.blocks, synthetic)
        self._ring = (
            Ring(CudaLanes(self._device), (spec.batch_size, *spec.pixels.shape, 3))
            if device == "cuda"
            else None
        )
        self._stepping = threading.Lock()
        self._sizes: tuple[int, ...] = (spec.batch_size,)
        self._workers = workers
        self._map: Callable[..., Iterable[Callable[[], list[Any]] | None]] = map
        if device == "cpu":
            # A thread a batch, and not threads within it: they would wait for each other after
            # every layer, for long where decoders share the cores. Two Zen 5 cores, ViT-Tiny: 203
            # images/s so; 204 with threads that spin, 117 with sleeping ones.
            torch.set_num_threads(1)
        if workers > 1:
            self._map = ThreadPoolExecutor(workers, "vitray-predict").map
        packed = device == "cpu" and pack(network.blocks, DTYPES[spec.precision])
        self._compiled: dict[int, Any] = {}  # by batch size; other sizes run uncompiled
        if compiled:
            self._compile(packed)

    def _compile(self, packed: bool) -> None:
        """Every size of the ladder, now: none is compiled later. Where that fails all sizes run
        uncompiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        self._sizes = ladder(self._spec.batch_size)
        self._compiled = dict.fromkeys(self._sizes, torch.compile(self._forward, dynamic=False))
        # Freezing lays the weights out as this CPU likes them, where they are not packed; then no
        # graph is kept for the next start. It must be on while dynamo traces, so `options=` would
        # not do. The joint passes turn `Attention`'s matmuls back into the slower fused kernel.
        on_cpu = (
            {"freezing": not packed, "use_joint_graph_passes": False}
            if self._device.type == "cpu"
            else {}
        )
        # Dynamo counts compilations by code, for all models of a process; a ladder is all that one
        # model ever asks for
        of_a_ladder = {"recompile_limit": 256}
        try:
            with (
                graphs_kept() as place,
                torch._inductor.config.patch(on_cpu),
                torch._dynamo.config.patch(of_a_ladder),
            ):
                for size in self._compiled:
                    if (
                        self._run_if_it_fits(
                            np.zeros((size, *self._spec.pixels.shape, 3), np.uint8), size
                        )
                        is None
                    ):
                        self._step_down(self._sizes)
        except TorchDynamoException as error:
            reason = one_line(error, 200)
            needs = (
                f"It needs g++, and room in {place}, whose contents the next start compiles anew; "
                f"or set compile: off"
            )
            log.warning(
                "%s runs uncompiled, torch.compile failed: %s. %s", self._spec.model, reason, needs
            )
            self._sizes, self._compiled = (self._spec.batch_size,), {}

    def predict(self, pixels: Any) -> Predictions:
        """Labels and embeddings, batch by batch; on a GPU from several threads at once, to hide
        what each does besides.

        pixels: uint8 [N, H, W, 3], RGB, at the processor's size; an array, or a tensor on the
        device. Raises ModelError for another shape, for results that are not finite in this
        precision, and when not even one image fits the device.
        """
        check_pixels(self._spec, pixels)
        parts, done = list[Callable[[], list[Any]]](), 0
        while done < len(pixels):
            sizes = self._sizes
            batches = self._cut(len(pixels) - done, sizes)
            spans = [
                pixels[start : start + n]
                for start, n in zip(accumulate(batches, initial=done), batches)
            ]
            for n, part in zip(batches, self._map(self._run_if_it_fits, spans, batches)):
                if part is None:
                    self._step_down(sizes)
                    break
                parts.append(part)
                done += n
        columns = [torch.cat(column).cpu().numpy() for column in zip(*(part() for part in parts))]
        return gather(self._spec, self._vectors, self._k, columns)

    def _cut(self, images: int, sizes: tuple[int, ...]) -> list[int]:
        """Batch sizes. Where no size is compiled every worker gets as much as the others."""
        if self._compiled or self._workers == 1:
            return cut(images, sizes, PADDING if self._compiled else 0.0)
        return share(images, sizes[0], self._workers)

    def _run_if_it_fits(self, batch: Any, size: int) -> Callable[[], list[Any]] | None:
        """What waits for scores, ids, then one tensor a vector column; None when the memory does
        not suffice.

        size: how many images the pass is for; what the batch lacks is padded, and cut off the
        answer.
        """
        try:
            with torch.inference_mode():
                if self._ring is not None:
                    return self._ring.start(batch, partial(self._pass, size)).wait
                if isinstance(batch, np.ndarray):
                    batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
                columns = self._pass(size, batch.to(self._device))
                return lambda: columns
        except RuntimeError as error:  # torch.OutOfMemoryError is one; CPU and MPS raise plain ones
            known = ("out of memory", "can't allocate memory")
            if isinstance(error, torch.OutOfMemoryError) or any(
                text in str(error).lower() for text in known
            ):
                return None
            raise

    def _pass(self, size: int, pixels: Any) -> list[Any]:
        forward, images = self._compiled.get(size, self._forward), len(pixels)
        try:
            if images < size:
                pixels = torch.cat([pixels, pixels[:1].expand(size - images, -1, -1, -1)])
            return [column[:images] for column in forward(pixels)]
        finally:
            self._forward.caught.tokens.clear()

    def _step_down(self, sizes: tuple[int, ...]) -> None:
        """sizes: those that were too large. Another thread may have stepped down from them
        meanwhile.
        """
        with self._stepping:
            if self._sizes == sizes:
                self._halve()

    def _halve(self) -> None:
        if self._sizes == (1,):
            raise ModelError(
                f"{self._spec.model} does not fit {self._device}: one image is too much for it. "
                f"Use a larger device."
            )
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()
        batch = self._sizes[0]
        if batch == self._spec.batch_size:
            log.warning(
                "%s: out of memory with %d images at once, halving; set batch_size lower",
                self._spec.model,
                batch,
            )
        self._sizes = self._sizes[1:] or (batch // 2,)
