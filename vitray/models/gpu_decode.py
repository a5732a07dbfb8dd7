"""JPEG bytes -> pixels on the GPU: its hardware decoder takes batches, CPU threads what it refuses.

In the mode `hybrid`, CPU threads also take a share of what the hardware could decode. decode.py
decides which images come here and how the CPU decodes one; pipeline/stages.py connects the two.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vitray.errors import ModelError
from vitray.schema import TORCH_FILTERS, PixelSpec

HARDWARE_IMAGES, HARDWARE_PIXELS = 128, 1 << 26  # at once; as float32 that is 0.8 GB
CPU_IMAGES = 4  # a thread takes at a time: few, so that no thread ends long after the others
TURNS: dict[int, Callable[[Any], Any]] = {  # by the EXIF orientation of [3, H, W]
    1: lambda x: x,
    2: lambda x: x.flip(-1),
    3: lambda x: x.flip(-1, -2),
    4: lambda x: x.flip(-2),
    5: lambda x: x.mT,
    6: lambda x: x.mT.flip(-1),
    7: lambda x: x.mT.flip(-1, -2),
    8: lambda x: x.mT.flip(-2),
}


@dataclass(frozen=True, slots=True)
class Coded:
    """A whole baseline JPEG.

    turn: EXIF orientation 1..8. width, height: of the header, before the turn.
    """

    data: Any  # bytes-like
    turn: int
    width: int
    height: int


@dataclass
class DeviceDecoder:
    """Decodes for any number of threads at once.

    hardware: whole JPEGs -> uint8 [3, H, W] each, on the device. It raises RuntimeError if it
    cannot decode one of them.
    on_cpu: bytes -> pixels uint8 [n_good, H, W, 3], and for each image an outcome, whose `reason`
    is None for a good one.
    fit: (width, height) upright -> the same after the resize.
    resize: uint8 [n, 3, H, W] and (height, width) -> the same, smaller.
    shares: CPU threads also take from the hardware's queue.
    """

    spec: PixelSpec
    device: Any
    hardware: Callable[[list[Any]], list[Any]]
    on_cpu: Callable[[list[Any]], tuple[np.ndarray, Sequence[Any]]]
    fit: Callable[[tuple[int, int]], tuple[int, int]]
    resize: Callable[[Any, tuple[int, int]], Any]
    threads: int
    shares: bool
    _per_thread: threading.local = field(init=False, default_factory=threading.local)
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, self.threads), "vitray-decode")

    def decode(self, images: Sequence[Coded | np.ndarray]) -> tuple[Any, dict[int, Any]]:
        """uint8 [n_good, H, W, 3] on the device, in order and ready, and the bad images' outcomes.

        The outcomes are by position. An array among the images is already decoded.
        """
        with self._stream() as stream:
            pixels, bad = self._decode(images)
            if stream is not None:
                stream.synchronize()
        return pixels, bad

    @contextlib.contextmanager
    def _stream(self) -> Any:
        """A stream for each thread, so that the model waits for no other thread's images."""
        if torch.device(self.device).type != "cuda":
            yield None
            return
        if not hasattr(self._per_thread, "stream"):
            self._per_thread.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._per_thread.stream):
            yield self._per_thread.stream

    def _decode(self, images: Sequence[Coded | np.ndarray]) -> tuple[Any, dict[int, Any]]:
        out = torch.empty((len(images), *self.spec.shape, 3), dtype=torch.uint8, device=self.device)
        waiting = deque(at for at, image in enumerate(images) if isinstance(image, Coded))
        rows: dict[int, np.ndarray] = {
            at: image for at, image in enumerate(images) if not isinstance(image, Coded)
        }
        bad: dict[int, Any] = {}

        def decode_on_cpu(chosen: list[int]) -> None:
            pixels, outcomes = self.on_cpu([images[at].data for at in chosen])
            good = iter(pixels)
            for at, outcome in zip(chosen, outcomes):
                if outcome.reason is None:
                    rows[at] = next(good).copy()  # pages of decoded pixels are few
                else:
                    bad[at] = outcome

        def take_share() -> None:
            while chosen := _take(waiting.pop, CPU_IMAGES):
                decode_on_cpu(chosen)

        tasks = [self._pool.submit(take_share) for _ in range(self.threads if self.shares else 0)]
        while chosen := _take(waiting.popleft, HARDWARE_IMAGES):
            for piece in split_for_hardware(chosen, images):
                if refused := self._by_hardware(piece, images, out):
                    tasks.append(self._pool.submit(decode_on_cpu, refused))
        for task in tasks:
            task.result()
        if rows:
            positions = sorted(rows)
            decoded = torch.from_numpy(np.stack([rows[at] for at in positions]))
            out[torch.tensor(positions, device=self.device)] = decoded.to(self.device)
        if bad:
            good_positions = [at for at in range(len(images)) if at not in bad]
            out = out[torch.tensor(good_positions, dtype=torch.int64, device=self.device)]
        return out, bad

    def _by_hardware(self, chosen: list[int], images: Sequence[Any], out: Any) -> list[int]:
        """Fill their rows of `out`; returns the positions of those that the hardware refuses.

        The hardware does not say which image it refuses, so halving finds it.
        """
        try:
            decoded = self.hardware([images[at].data for at in chosen])
        except RuntimeError:  # also torch.OutOfMemoryError
            if len(chosen) == 1:
                return chosen
            half = len(chosen) // 2
            first = self._by_hardware(chosen[:half], images, out)
            return first + self._by_hardware(chosen[half:], images, out)
        by_size: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        refused = []
        for at, image in zip(chosen, decoded):
            if tuple(image.shape) != (3, images[at].height, images[at].width):
                refused.append(at)
                continue
            upright = TURNS[images[at].turn](image)
            by_size.setdefault((upright.shape[1], upright.shape[2]), []).append((at, upright))
        for (height, width), members in by_size.items():
            fitted = self._fit(torch.stack([image for _, image in members]), width, height)
            positions = torch.tensor([at for at, _ in members], device=self.device)
            out[positions] = fitted.permute(0, 2, 3, 1)
        return refused

    def _fit(self, images: Any, width: int, height: int) -> Any:
        """uint8 [n, 3, H, W] of one size, resized and cropped as the spec says."""
        to_width, to_height = self.fit((width, height))
        fitted = self.resize(images, (to_height, to_width))
        if self.spec.crop is None:
            return fitted
        rows, columns = self.spec.crop
        top = (to_height - rows) // 2
        left_edge = (to_width - columns) // 2
        return fitted[..., top : top + rows, left_edge : left_edge + columns]


def _take(end: Callable[[], int], most: int) -> list[int]:
    """At most so many items from one end of a queue that other threads empty, too."""
    taken: list[int] = []
    with contextlib.suppress(IndexError):
        while len(taken) < most:
            taken.append(end())
    return taken


def split_for_hardware(chosen: list[int], images: Sequence[Any]) -> list[list[int]]:
    """The positions in order, in groups of at most HARDWARE_PIXELS, except for a single image."""
    groups: list[list[int]] = []
    pixels_left = 0
    for at in chosen:
        pixels = images[at].width * images[at].height
        if pixels > pixels_left:
            groups.append([])
            pixels_left = HARDWARE_PIXELS
        groups[-1].append(at)
        pixels_left -= pixels
    return groups


def open_decoder(
    spec: PixelSpec, on_cpu: Any, fit: Any, threads: int, shares: bool
) -> DeviceDecoder:
    """The decoder of this machine's GPU. Raises ModelError without one, or without torchvision."""
    require("cuda")
    resize = partial(resize_on_device, mode=TORCH_FILTERS[spec.resample])
    return DeviceDecoder(
        spec, torch.device("cuda"), jpeg_engine(), on_cpu, fit, resize, threads, shares
    )


def require(device: str) -> None:
    """Raise ModelError unless the device is a GPU, and torchvision can decode there."""
    missing = ""
    if device != "cuda" or not torch.cuda.is_available():
        missing = "a CUDA device"
    elif not find_spec("torchvision"):
        missing = "torchvision"
    if missing:
        raise ModelError(
            f"decode gpu and hybrid need {missing}: install vitray[gpu] on a machine with a GPU, "
            "or set decode: fast."
        )


def jpeg_engine() -> Callable[[list[Any]], list[Any]]:
    """torchvision's batched decoder: nvJPEG, on the GPU's own JPEG engines where it has them."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def run(blobs: list[Any]) -> list[Any]:
        # a copy of each: torch needs writable memory
        coded = [torch.from_numpy(np.array(np.frombuffer(blob, np.uint8))) for blob in blobs]
        decoded: list[Any] = decode_jpeg(coded, mode=ImageReadMode.RGB, device="cuda")
        return decoded

    return run


def resize_on_device(images: Any, size: tuple[int, int], mode: str) -> Any:
    """torch's antialiased resize of uint8 as on a CPU, with some pixels a level off.

    A GPU resizes floats only.
    """
    fitted = torch.nn.functional.interpolate(images.float(), size, mode=mode, antialias=True)
    return fitted.round_().clamp_(0, 255).to(torch.uint8)
