"""The torch engine: cuts images into batches, runs the forward pass and gathers its results.

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
from vitray.models.batching import PADDING, check_pixels, cut, gather, ladder, share
from vitray.models.blocks import FLOAT8_IMAGES, pack, quantise, synthetic_images
from vitray.models.compile_cache import graph_directory
from vitray.models.forward import DTYPES, Forward
from vitray.models.loading import Network
from vitray.models.pinned_buffers import CudaStreams, PinnedBuffers
from vitray.models.types import Placement, Predictions
from vitray.schema import ModelOutputs, ModelSpec
from vitray.totals import copied_bytes, predicted_images

log = logging.getLogger(__name__)

# the columns of one batch: scores, ids, then one tensor for each vector
Columns = list[Any]


class TorchModel:
    """A Model over a Network in spec.precision.

    It halves its batch, for good, when the device runs out of memory.
    """

    def __init__(
        self, network: Network, spec: ModelSpec, outputs: ModelOutputs, placement: Placement
    ) -> None:
        self._spec = spec
        self._outputs = outputs.limited_to(len(spec.labels))
        self._device = torch.device(placement.device)
        self._workers = placement.workers
        on_cpu = placement.device == "cpu"
        on_cuda = placement.device == "cuda"
        if spec.precision == "fp32" and on_cuda:
            # the patch embedding is a convolution, which has 10 bits of mantissa otherwise
            torch.backends.cudnn.allow_tf32 = False
        self.forward = Forward(network, spec, self._outputs, self._device)
        if spec.precision == "fp8":
            images = min(FLOAT8_IMAGES, spec.batch_size)
            synthetic = synthetic_images(images, spec.pixels.shape, self._device)
            self.agreement = quantise(self.forward, network.blocks, synthetic)
        self.buffers: PinnedBuffers | None = None
        if on_cuda:
            shape = (spec.batch_size, *spec.pixels.shape, 3)
            self.buffers = PinnedBuffers(CudaStreams(self._device), shape)
        self._stepping = threading.Lock()
        self.sizes: tuple[int, ...] = (spec.batch_size,)
        self._map: Callable[..., Iterable[Callable[[], Columns] | None]] = map
        if on_cpu:
            # One thread for each batch, not several within it. Those would wait for each other
            # after every layer, and for long where decoders share the cores. Two Zen 5 cores,
            # ViT-Tiny: 203 images/s so; 204 with threads that spin, 117 with sleeping ones.
            torch.set_num_threads(1)
        if placement.workers > 1:
            self._map = ThreadPoolExecutor(placement.workers, "vitray-predict").map
        is_packed = on_cpu and pack(network.blocks, DTYPES[spec.precision])
        self.compiled: dict[int, Any] = {}  # by batch size; other sizes run uncompiled
        if placement.compiled:
            self._compile(is_packed)

    def _compile(self, is_packed: bool) -> None:
        """Compile every size of the ladder now, so that none is compiled later.

        If that fails, all sizes run uncompiled.
        """
        from torch._dynamo.exc import TorchDynamoException

        self.sizes = ladder(self._spec.batch_size)
        self.compiled = dict.fromkeys(self.sizes, torch.compile(self.forward, dynamic=False))
        inductor_options: dict[str, bool] = {}
        if self._device.type == "cpu":
            # Freezing lays out the weights for this CPU, where they are not packed; but then no
            # graph is kept for the next start. It must be on while dynamo traces, so `options=`
            # would not work. The joint passes turn `Attention`'s matmuls back into the slower
            # fused kernel.
            inductor_options = {"freezing": not is_packed, "use_joint_graph_passes": False}
        # dynamo counts compilations by code, for all models of a process; one model never needs
        # more than a ladder
        dynamo_options = {"recompile_limit": 256}
        try:
            with (
                graph_directory() as directory,
                torch._inductor.config.patch(inductor_options),
                torch._dynamo.config.patch(dynamo_options),
            ):
                for size in self.compiled:
                    shape = (size, *self._spec.pixels.shape, 3)
                    if self._run_if_it_fits(np.zeros(shape, np.uint8), size) is None:
                        self._step_down(self.sizes)
        except TorchDynamoException as error:
            log.warning(
                "%s runs uncompiled, torch.compile failed: %s. It needs g++, and space in %s, "
                "whose contents the next start compiles again; or set compile: off",
                self._spec.model,
                one_line(error, 200),
                directory,
            )
            self.sizes = (self._spec.batch_size,)
            self.compiled = {}

    def predict(self, pixels: Any) -> Predictions:
        """Labels and embeddings, batch by batch.

        On a GPU, call it from several threads at once, to hide the work around the forward pass.
        pixels: uint8 [N, H, W, 3], RGB, at the processor's size; an array, or a tensor on the
        device. Raises ModelError for another shape, for results that are not finite in this
        precision, and when not even one image fits into the device's memory.
        """
        check_pixels(self._spec, pixels)
        parts: list[Callable[[], Columns]] = []
        done = 0
        while done < len(pixels):
            sizes = self.sizes
            batches = self._cut(len(pixels) - done, sizes)
            starts = accumulate(batches, initial=done)
            spans = [pixels[start : start + n] for start, n in zip(starts, batches)]
            for n, part in zip(batches, self._map(self._run_if_it_fits, spans, batches)):
                if part is None:
                    self._step_down(sizes)
                    break
                parts.append(part)
                done += n
                predicted_images.add(n)
        columns = [torch.cat(column).cpu().numpy() for column in zip(*(part() for part in parts))]
        return gather(self._spec, self._outputs, columns)

    def _cut(self, images: int, sizes: tuple[int, ...]) -> list[int]:
        """Batch sizes. Without compiled sizes every worker gets the same number of images."""
        if self.compiled or self._workers == 1:
            return cut(images, sizes, PADDING if self.compiled else 0.0)
        return share(images, sizes[0], self._workers)

    def _run_if_it_fits(self, batch: Any, size: int) -> Callable[[], Columns] | None:
        """A function that waits for the batch's columns; None when the memory does not suffice.

        size: the number of images of the pass. A smaller batch is padded, and its columns are cut.
        """
        try:
            with torch.inference_mode():
                work = partial(self._pass, size, len(batch))
                if self.buffers is not None:
                    return self.buffers.start(batch, work, size).wait
                columns = work(self._tensor(batch).to(self._device))
                return lambda: columns
        except RuntimeError as error:
            if _is_out_of_memory(error):
                return None
            raise

    def _tensor(self, batch: Any) -> Any:
        """The batch as a tensor: on the memory of the array, where torch can use it."""
        if not isinstance(batch, np.ndarray):
            return batch
        usable = np.require(batch, requirements=["C", "W"])
        if usable is not batch:
            copied_bytes.add(batch.nbytes)
        return torch.from_numpy(usable)

    def _pass(self, size: int, images: int, pixels: Any) -> Columns:
        """The columns of the first `images` of the pixels, after a pass over `size` images."""
        forward = self.compiled.get(size, self.forward)
        try:
            if len(pixels) < size:
                if pixels.is_cpu:
                    copied_bytes.add(pixels.nbytes)
                pixels = torch.cat([pixels, pixels[:1].expand(size - len(pixels), -1, -1, -1)])
            return [column[:images] for column in forward(pixels)]
        finally:
            self.forward.caught.tokens.clear()

    def _step_down(self, sizes: tuple[int, ...]) -> None:
        """Use smaller batches than `sizes`, unless another thread has done so already."""
        with self._stepping:
            if self.sizes == sizes:
                self._halve()

    def _halve(self) -> None:
        if self.sizes == (1,):
            raise ModelError(
                f"{self._spec.model} does not fit {self._device}: "
                "one image needs more than its memory. Use a larger device."
            )
        if self._device.type != "cpu":
            torch.accelerator.empty_cache()
        batch = self.sizes[0]
        if batch == self._spec.batch_size:
            log.warning(
                "%s: out of memory with %d images at once, halving; set batch_size lower",
                self._spec.model,
                batch,
            )
        self.sizes = self.sizes[1:] or (batch // 2,)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out. CPU and MPS raise a RuntimeError with no type of its own."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error).lower() for text in texts
    )
