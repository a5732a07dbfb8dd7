"""Host memory that the device reads by itself, so that an upload needs no copy to a pinned buffer.

The memory is registered once, as a whole. Then every array in it can be uploaded as it is.
Imports torch only to register.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

from numpy.typing import NDArray

from vitray.errors import one_line

log = logging.getLogger(__name__)

PORTABLE = 1  # cudaHostRegisterPortable: for every context of the process


class Driver(Protocol):
    """What a device's driver must offer."""

    def pin(self, address: int, size_bytes: int) -> None:
        """Raises an exception of any type if it cannot."""

    def unpin(self, address: int) -> None: ...


class HostMemory:
    """The registered memory of one process. Any thread may call it."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        # By address. Without a lock: a finalizer may call `unregister` within any other code, also
        # of this class. Each operation on the dict is atomic.
        self._stops: dict[int, int] = {}
        self._failing = threading.Lock()  # for _has_failed
        self._has_failed = False

    def register(self, memory: NDArray[Any]) -> bool:
        """Let the device read this memory until `unregister`. False, and a log line, if it cannot.

        memory: contiguous. It must stay mapped until then.
        """
        address = _address(memory)
        try:
            self._driver.pin(address, memory.nbytes)
        except Exception as error:  # without a driver, torch raises AssertionError
            with self._failing:
                is_first = not self._has_failed
                self._has_failed = True
            if is_first:
                log.warning(
                    "the GPU's driver cannot read the decoders' memory (%s), so pixels are copied "
                    "to pinned buffers first. Look at the limit of locked memory (ulimit -l)",
                    one_line(error, 200),
                )
            return False
        self._stops[address] = address + memory.nbytes
        return True

    def unregister(self, address: int) -> None:
        """Undo `register` for the memory at an address; nothing happens for other memory.

        Takes no lock, so a finalizer may call it.
        """
        if self._stops.pop(address, None) is not None:
            self._driver.unpin(address)

    def is_registered(self, array: NDArray[Any]) -> bool:
        """Whether the device can read all of the array where it is."""
        if not array.flags.c_contiguous:
            return False
        start = _address(array)
        stop = start + array.nbytes
        stops = self._stops.copy()
        return any(first <= start and stop <= last for first, last in stops.items())


def _address(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


class CudaDriver:
    """cudaHostRegister and cudaHostUnregister, as torch offers them."""

    def pin(self, address: int, size_bytes: int) -> None:
        import torch

        result = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, PORTABLE))
        if result:
            raise OSError(f"cudaHostRegister of {size_bytes >> 20} MB: CUDA error {result}")

    def unpin(self, address: int) -> None:
        import torch

        torch.cuda.cudart().cudaHostUnregister(address)


process_memory = HostMemory(CudaDriver())
