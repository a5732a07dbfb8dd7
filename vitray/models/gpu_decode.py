"""JPEG bytes -> pixels on the GPU: its hardware decoder takes batches, CPU threads what it refuses,
and a share of the rest if asked.

Which images come here, and what the CPU makes of one, is for decode.py to say; pipeline/steps.py
brings the two together.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from vitray.errors import ModelError
from vitray.models.pixels import GPU_FILTERS
from vitray.schema import PixelSpec

HARDWARE_IMAGES, HARDWARE_PIXELS = 128, 1 << 26  # at once; as float32 that is 0.8 GB
CPU_IMAGES = (
    4  # a thread's bite of the shared queue: small, so that none of them is the last by far
)
TURNS: dict[int, Callable[[Any], Any]] = {  # EXIF orientation of [3, H, W]
    **{
        1: lambda x: x,
        2: lambda x: x.flip(-1),
        3: lambda x: x.flip(-1, -2),
        4: lambda x: x.flip(-2),
        5: lambda x: x.mT,
    },
    **{6: lambda x: x.mT.flip(-1), 7: lambda x: x.mT.flip(-1, -2), 8: lambda x: x.mT.flip(-2)},
}


@dataclass(frozen=True, slots=True)
class Coded:
    """A whole baseline JPEG. turn: EXIF orientation 1..8; width, height: of the header, before it
    is turned.
    """

    data: Any  # bytes-like
    turn: int
    width: int
    height: int


@dataclass
class DeviceDecoder:
    """Decodes for any number of threads at once.

    hardware: whole JPEGs -> uint8 [3, H, W] each, on the device; it raises RuntimeError where one
    of them is beyond it.
    on_cpu: bytes -> pixels uint8 [n_good, H, W, 3] and an outcome each, whose `reason` is None
    where it is good.
    fit: (width, height) upright -> the same after the resize. resize: uint8 [n, 3, H, W] and
    (height, width) -> the same, smaller.
    shares: CPU threads take from the hardware's queue, too.
    """

    spec: PixelSpec
    device: Any
    hardware: Callable[[list[Any]], list[Any]]
    on_cpu: Callable[[list[Any]], tuple[np.ndarray, Sequence[Any]]]
    fit: Callable[[tuple[int, int]], tuple[int, int]]
    resize: Callable[[Any, tuple[int, int]], Any]
    threads: int
    shares: bool
    _lane: threading.local = field(init=False, default_factory=threading.local)
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, self.threads), "vitray-decode")

    def decode(self, images: Sequence[Coded | np.ndarray]) -> tuple[Any, dict[int, Any]]:
        """uint8 [n_good, H, W, 3] on the device, in order and ready, and by position the outcomes
        of those that are bad.

        An array is an image that is decoded already.
        """
        with self._stream() as stream:
            pixels, bad = self._decode(images)
            if stream is not None:
                stream.synchronize()
        return pixels, bad

    @contextlib.contextmanager
    def _stream(self) -> Any:
        """A lane of this thread's own: the model does not wait for another thread's images."""
        if torch.device(self.device).type != "cuda":
            yield None
            return
        if not hasattr(self._lane, "stream"):
            self._lane.stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._lane.stream):
            yield self._lane.stream

    def _decode(self, images: Sequence[Coded | np.ndarray]) -> tuple[Any, dict[int, Any]]:
        out = torch.empty((len(images), *self.spec.shape, 3), dtype=torch.uint8, device=self.device)
        waiting = deque(at for at, image in enumerate(images) if isinstance(image, Coded))
        rows: dict[int, np.ndarray] = {
            at: image for at, image in enumerate(images) if not isinstance(image, Coded)
        }
        bad: dict[int, Any] = {}

        def by_cpu(chosen: list[int]) -> None:
            pixels, outcomes = self.on_cpu([images[at].data for at in chosen])
            good = iter(pixels)
            for at, outcome in zip(chosen, outcomes):
                if outcome.reason is None:
                    rows[at] = next(good).copy()  # pages of decoded pixels are few
                else:
                    bad[at] = outcome

        def help_out() -> None:
            while chosen := _take(waiting.pop, CPU_IMAGES):
                by_cpu(chosen)

        others = [self._pool.submit(help_out) for _ in range(self.threads if self.shares else 0)]
        while chosen := _take(waiting.popleft, HARDWARE_IMAGES):
            for piece in _pieces(chosen, images):
                if refused := self._by_hardware(piece, images, out):
                    others.append(self._pool.submit(by_cpu, refused))
        for other in others:
            other.result()
        if rows:
            places = sorted(rows)
            out[torch.tensor(places, device=self.device)] = torch.from_numpy(
                np.stack([rows[p] for p in places])
            ).to(self.device)
        if bad:
            out = out[
                torch.tensor(
                    [at for at in range(len(images)) if at not in bad],
                    dtype=torch.int64,
                    device=self.device,
                )
            ]
        return out, bad

    def _by_hardware(self, chosen: list[int], images: Sequence[Any], out: Any) -> list[int]:
        """Their rows of `out` are filled; those that the hardware refuses come back: it names none,
        so they are found by halving.
        """
        try:
            decoded = self.hardware([images[at].data for at in chosen])
        except RuntimeError:  # also torch.OutOfMemoryError
            if len(chosen) == 1:
                return chosen
            half = len(chosen) // 2
            return self._by_hardware(chosen[:half], images, out) + self._by_hardware(
                chosen[half:], images, out
            )
        alike: dict[tuple[int, int], list[tuple[int, Any]]] = {}
        refused = []
        for at, image in zip(chosen, decoded):
            if tuple(image.shape) != (3, images[at].height, images[at].width):
                refused.append(at)
                continue
            upright = TURNS[images[at].turn](image)
            alike.setdefault((upright.shape[1], upright.shape[2]), []).append((at, upright))
        for (height, width), members in alike.items():
            to_width, to_height = self.fit((width, height))
            fitted = self.resize(
                torch.stack([image for _, image in members]), (to_height, to_width)
            )
            if self.spec.crop is not None:
                rows, columns = self.spec.crop
                top, left = (to_height - rows) // 2, (to_width - columns) // 2
                fitted = fitted[..., top : top + rows, left : left + columns]
            out[torch.tensor([at for at, _ in members], device=self.device)] = fitted.permute(
                0, 2, 3, 1
            )
        return refused


def _take(end: Callable[[], int], most: int) -> list[int]:
    """Up to so many from one end of a queue that others empty, too."""
    taken: list[int] = []
    with contextlib.suppress(IndexError):
        while len(taken) < most:
            taken.append(end())
    return taken


def _pieces(chosen: list[int], images: Sequence[Any]) -> list[list[int]]:
    """In order, none of more than HARDWARE_PIXELS except a single image."""
    pieces: list[list[int]] = []
    room = 0
    for at in chosen:
        pixels = images[at].width * images[at].height
        if pixels > room:
            pieces.append([])
            room = HARDWARE_PIXELS
        pieces[-1].append(at)
        room -= pixels
    return pieces


def open_decoder(
    spec: PixelSpec, on_cpu: Any, fit: Any, threads: int, shares: bool
) -> DeviceDecoder:
    """The decoder of this machine's GPU. Raises ModelError without one, or without torchvision."""
    require("cuda")
    resize = partial(export_model, mode=GPU_FILTERS[spec.resample])
    return DeviceDecoder(
        spec, torch.device("cuda"), jpeg_engine(), on_cpu, fit, resize, threads, shares
    )


def require(device: str) -> None:
    """Raises ModelError unless the device is a GPU, with torchvision to decode there."""
    from importlib.util import find_spec

    lacks = "a CUDA device" if device != "cuda" or not torch.cuda.is_available() else ""
    lacks = lacks or ("" if find_spec("torchvision") else "torchvision")
    if lacks:
        raise ModelError(
            f"decode gpu and hybrid need {lacks}: install vitray[gpu] on a machine with a GPU, or "
            f"set decode: fast."
        )


def jpeg_engine() -> Callable[[list[Any]], list[Any]]:
    """torchvision's batched decoder: nvJPEG, on the GPU's own JPEG engines where it has them."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def run(blobs: list[Any]) -> list[Any]:
        # a copy each: torch wants memory that may be written
        coded = [torch.from_numpy(np.array(np.frombuffer(blob, np.uint8))) for blob in blobs]
        decoded: list[Any] = decode_jpeg(coded, mode=ImageReadMode.RGB, device="cuda")
        return decoded

    return run


def export_model(images: Any, size: tuple[int, int], mode: str) -> Any:
    """As torch's antialiased resize of uint8 on a CPU, a level off here and there: on a GPU there
    is one for floats only.
    """
    fitted = torch.nn.functional.interpolate(images.float(), size, mode=mode, antialias=True)
    return fitted.round_().clamp_(0, 255).to(torch.uint8)
