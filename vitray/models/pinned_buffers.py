"""A ring of batches on their way through an accelerator, so that copies and Python hide behind
compute.

Three slots: while one batch computes, the next is uploaded and a third is filled. Only two things
wait for the device: who needs a slot whose batch is not over, and who reads results. What a device
must offer is `Lanes`; `CudaLanes` is the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import torch

SLOTS = 3
Work = Callable[[Any], list[Any]]


class Event(Protocol):
    def synchronize(self) -> None:
        """Wait until all that was asked for before it is over. Raises what went wrong there."""
        ...


class Lanes(Protocol):
    """A device with a lane for uploads and one for work; what is asked of a lane is done in order,
    later.
    """

    def buffers(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """uint8 tensors of a shape: on the host, in memory that the device may read at any time,
        and on the device.
        """
        ...

    def upload(self, host: Any, there: Any) -> Event: ...

    def compute(self, work: Work, pixels: Any, after: Event | None) -> tuple[list[Any], Event]:
        """work(pixels) after an event, and its columns on the host: not before the event that comes
        with them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Started:
    """A batch that was handed over."""

    columns: list[Any]
    over: Event

    def wait(self) -> list[Any]:
        self.over.synchronize()
        return self.columns


class _Slot:
    def __init__(self, buffers: tuple[Any, Any]) -> None:
        self.host, self.there = buffers
        self.busy: Event | None = None  # until then its buffers are read
        self.lock = threading.Lock()


class Ring:
    """Takes batches from any number of threads; each thread's answers belong to its own calls, in
    order.
    """

    def __init__(self, lanes: Lanes, shape: tuple[int, ...]) -> None:
        """shape: of the largest batch, [N, H, W, 3]."""
        self._lanes = lanes
        self._turns = cycle([_Slot(lanes.buffers(shape)) for _ in range(SLOTS)])  # next() is atomic
        self._launching = threading.Lock()  # the forward pass keeps its tokens in one place

    def start(self, batch: Any, work: Work) -> Started:
        """Hand a batch over: uint8 [n, H, W, 3], an array here or a tensor on the device. Raises
        what `work` raises.

        An array may be changed or freed at once; a tensor must be ready, and stay until its results
        were waited for.
        """
        if not isinstance(batch, np.ndarray):
            with self._launching:
                return Started(*self._lanes.compute(work, batch, None))
        slot = next(self._turns)
        with slot.lock:
            if slot.busy is not None:
                slot.busy.synchronize()
            host, there = slot.host[: len(batch)], slot.there[: len(batch)]
            np.copyto(host.numpy(), batch)
            slot.busy = self._lanes.upload(host, there)
            with self._launching:
                started = Started(*self._lanes.compute(work, there, slot.busy))
            slot.busy = started.over
        return started


class CudaLanes:
    """Two streams of a CUDA device, linked by events."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._uploads, self._work = torch.cuda.Stream(device), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)  # the weights were laid out in another stream

    def buffers(self, shape: tuple[int, ...]) -> tuple[Any, Any]:
        host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        return host, torch.empty(shape, dtype=torch.uint8, device=self._device)

    def upload(self, host: Any, there: Any) -> Event:
        with torch.cuda.stream(self._uploads):
            there.copy_(host, non_blocking=True)
            return self._mark(self._uploads)

    def compute(self, work: Work, pixels: Any, after: Event | None) -> tuple[list[Any], Event]:
        with torch.cuda.stream(self._work):
            if after is not None:
                self._work.wait_event(after)
            # to the host without blocking: torch takes pinned memory for that, and keeps it for the
            # next time
            columns = [column.to("cpu", non_blocking=True) for column in work(pixels)]
            return columns, self._mark(self._work)

    def _mark(self, stream: Any) -> Event:
        event: Event = torch.cuda.Event(
            blocking=True
        )  # who waits sleeps: spinning takes the core from a decoder
        stream.record_event(event)
        return event
