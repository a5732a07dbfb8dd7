"""Pinned buffers for batches on an accelerator, so that copies and Python work hide behind compute.

Three slots: one batch computes, the next is uploaded, a third is filled. Only two callers wait for
the device: one that needs a slot whose batch is not finished, and one that reads results.
Arrays that the device can read by itself (host_memory.py) are uploaded from where they are.
`Streams` is what a device must offer, and `CudaStreams` is the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch

from vitray.models.host_memory import HostMemory, process_memory
from vitray.totals import copied_bytes

SLOTS = 3
Work = Callable[[Any], list[Any]]


class Event(Protocol):
    def synchronize(self) -> None:
        """Wait until all earlier work of the stream is finished. Raises what went wrong in it."""
        ...


class Streams(Protocol):
    """A device with a stream for uploads and one for work; each does its tasks in order, later."""

    def buffers(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """uint8 tensors of a shape: one on the host, one on the device.

        The device may read the host's at any time.
        """
        ...

    def upload(self, host: Any, on_device: Any) -> Event: ...

    def compute(self, work: Work, pixels: Any, after: Event | None) -> tuple[list[Any], Event]:
        """work(pixels), once `after` has happened: its columns on the host, and an event.

        The columns are valid once that event has happened.
        """
        ...


@dataclass(frozen=True, slots=True)
class Started:
    """A batch that was handed over. source: what the device reads until it is finished."""

    columns: list[Any]
    finished: Event
    source: Any = None

    def wait(self) -> list[Any]:
        self.finished.synchronize()
        return self.columns


class _Slot:
    def __init__(self, buffers: tuple[Any, Any]) -> None:
        self.host, self.on_device = buffers
        self.busy: Event | None = None  # its buffers are in use until then
        self.lock = threading.Lock()


class PinnedBuffers:
    """Takes batches from any number of threads; each caller gets the results of its own batches."""

    def __init__(
        self, streams: Streams, shape: tuple[int, ...], memory: HostMemory = process_memory
    ) -> None:
        """shape: of the largest batch, [N, H, W, 3]. memory: what the device reads by itself."""
        self._streams = streams
        self._memory = memory
        self._slots = cycle([_Slot(streams.buffers(shape)) for _ in range(SLOTS)])  # next is atomic
        self._launching = threading.Lock()  # the forward pass keeps its tokens in one place

    def start(self, batch: Any, work: Work, size: int | None = None) -> Started:
        """Hand over a batch: uint8 [n, H, W, 3], an array here or a tensor on the device.

        An array in registered memory must stay unchanged until its results were waited for; another
        one may be changed or freed at once. A tensor must be ready, and must stay until then, too.
        size: of the batch that `work` gets of an array. It ends with pixels of earlier batches,
        whose results mean nothing. Raises what `work` raises.
        """
        if not isinstance(batch, np.ndarray):
            with self._launching:
                return Started(*self._streams.compute(work, batch, None))
        slot = next(self._slots)
        with slot.lock:
            if slot.busy is not None:
                slot.busy.synchronize()
            host = self._readable(batch, slot)
            slot.busy = self._streams.upload(host, slot.on_device[: len(batch)])
            pixels = slot.on_device[: len(batch) if size is None else size]
            with self._launching:
                started = Started(*self._streams.compute(work, pixels, slot.busy), host)
            slot.busy = started.finished
        return started

    def _readable(self, batch: np.ndarray, slot: _Slot) -> Any:
        """The batch as a tensor that the device can read."""
        if self._memory.is_registered(batch):
            return torch.from_numpy(batch)
        host = slot.host[: len(batch)]
        np.copyto(host.numpy(), batch)
        copied_bytes.add(batch.nbytes)
        return host


class CudaStreams:
    """Two streams of a CUDA device, linked by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploads, self._work = torch.cuda.Stream(device), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)  # the weights were laid out in another stream

    def buffers(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return host, torch.empty(shape, dtype=torch.uint8, device=self._device)

    def upload(self, host: Any, on_device: Any) -> Event:
        with torch.cuda.stream(self._uploads):
            on_device.copy_(host, non_blocking=True)
            return self._record(self._uploads)

    def compute(self, work: Work, pixels: Any, after: Event | None) -> tuple[list[Any], Event]:
        with torch.cuda.stream(self._work):
            if after is not None:
                self._work.wait_event(after)
            # to the host without blocking: torch takes pinned memory for that, and keeps it for the
            # next time
            columns = [column.to("cpu", non_blocking=True) for column in work(pixels)]
            return columns, self._record(self._work)

    def _record(self, stream: Any) -> Event:
        # a caller that waits sleeps: spinning would take the core from a decoder
        event: Event = torch.cuda.Event(blocking=True)
        stream.record_event(event)
        return event
