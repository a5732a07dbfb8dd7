"""Registered host memory: uploaded from where it is, and nothing else is."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from factories.small_models import job_for, make_checkpoint, noise, run
from vitray.job import Embedding
from vitray.models import identify, open_model, vector_columns
from vitray.models.host_memory import CudaDriver, HostMemory
from vitray.models.pinned_buffers import PinnedBuffers
from vitray.models.torch_engine import TorchModel
from vitray.schema import ModelOutputs
from vitray.totals import copied_bytes


@dataclass
class FakeDriver:
    """What is pinned, by address. refuses: as a low limit of locked memory does."""

    refuses: bool = False
    pinned: dict[int, int] = field(default_factory=dict)

    def pin(self, address: int, size_bytes: int) -> None:
        if self.refuses:
            raise OSError("CUDA error 2")
        self.pinned[address] = size_bytes

    def unpin(self, address: int) -> None:
        del self.pinned[address]


@dataclass
class RecordingDevice:
    """A device whose work is done at once, and what it was given. sizes: of the passes."""

    hosts: list[torch.Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def buffers(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(shape, dtype=torch.uint8), torch.full(shape, 7, dtype=torch.uint8)

    def upload(self, host: torch.Tensor, on_device: torch.Tensor) -> Any:
        self.hosts.append(host)
        on_device.copy_(host)
        return SimpleNamespace(synchronize=lambda: None)

    def compute(self, work: Any, pixels: torch.Tensor, after: object) -> tuple[list[Any], Any]:
        self.sizes.append(len(pixels))
        return work(pixels), SimpleNamespace(synchronize=lambda: None)


def sums(pixels: torch.Tensor) -> list[torch.Tensor]:
    return [pixels.double().sum((1, 2, 3))]


def test_arrays_within_registered_memory_are_registered() -> None:
    driver = FakeDriver()
    memory = HostMemory(driver)
    slab = np.zeros(4096, np.uint8)
    page = slab[1000:3000].reshape(20, 5, 4, 5)
    assert not memory.is_registered(page)
    assert memory.register(slab) and driver.pinned == {slab.ctypes.data: 4096}
    assert memory.is_registered(slab) and memory.is_registered(page)
    assert memory.is_registered(page[3:7]) and memory.is_registered(page[:0])
    assert not memory.is_registered(page[:, ::2])  # not contiguous
    assert not memory.is_registered(page.copy())
    memory.unregister(slab.ctypes.data)
    assert not memory.is_registered(page) and driver.pinned == {}
    memory.unregister(slab.ctypes.data)


class Collecting(int):
    """A number during whose comparison the garbage collector runs."""

    def __radd__(self, other: int) -> Collecting:
        return Collecting(int(self) + other)

    def __le__(self, other: int) -> bool:
        gc.collect()
        return int(self) <= other


class CollectingArray(np.ndarray[Any, Any]):
    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return Collecting(super().nbytes)


class Owner:
    """Memory is unregistered with this object, which only the garbage collector frees."""

    def __init__(self, memory: HostMemory, slab: np.ndarray[Any, Any]) -> None:
        self.itself = self
        weakref.finalize(self, memory.unregister, slab.ctypes.data)


def test_memory_may_be_unregistered_by_the_garbage_collector_at_any_time() -> None:
    driver = FakeDriver()
    memory = HostMemory(driver)
    slabs = [np.zeros(4096, np.uint8) for _ in range(3)]
    assert all(memory.register(slab) for slab in slabs)
    gc.collect()
    gc.disable()
    try:
        Owner(memory, slabs[1])
        array = slabs[0].view(CollectingArray)
        results: list[bool] = []
        thread = threading.Thread(
            target=lambda: results.append(memory.is_registered(array)), daemon=True
        )
        thread.start()
        thread.join(10)
    finally:
        gc.enable()
    assert results == [True] and slabs[1].ctypes.data not in driver.pinned
    assert [memory.is_registered(slab) for slab in slabs] == [True, False, True]


def test_memory_that_cannot_be_registered_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = HostMemory(FakeDriver(refuses=True))
    slab = np.zeros(4096, np.uint8)
    with caplog.at_level(logging.WARNING):
        assert not memory.register(slab) and not memory.register(slab)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "(CUDA error 2), so pixels are copied to pinned buffers" in line and "ulimit -l" in line
    assert not memory.is_registered(slab)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_can_be_registered() -> None:
    assert not HostMemory(CudaDriver()).register(np.zeros(4096, np.uint8))


def test_registered_pixels_are_uploaded_from_where_they_are() -> None:
    memory = HostMemory(FakeDriver())
    device = RecordingDevice()
    buffers = PinnedBuffers(device, (4, 2, 2, 3), memory)
    page = noise(8, 2)
    memory.register(page)
    before = copied_bytes.value
    for n, start in enumerate((0, 4)):
        batch = page[start : start + 4]
        (column,) = buffers.start(batch, sums).wait()
        np.testing.assert_array_equal(column, batch.astype(float).sum((1, 2, 3)))
        assert np.shares_memory(device.hosts[n].numpy(), batch)
    assert copied_bytes.value == before
    other = page[:4].copy()
    buffers.start(other, sums).wait()
    assert not np.shares_memory(device.hosts[2].numpy(), other)
    assert copied_bytes.value == before + other.nbytes


def test_registered_pixels_stay_until_their_results_are_dropped() -> None:
    memory = HostMemory(FakeDriver())
    buffers = PinnedBuffers(RecordingDevice(), (4, 2, 2, 3), memory)
    page = noise(4, 2)
    memory.register(page)
    is_alive = weakref.ref(page)
    started = buffers.start(page, sums)
    del page
    buffers._streams.hosts.clear()  # type: ignore[attr-defined]
    assert is_alive() is not None
    started.wait()
    del started
    assert is_alive() is None


def test_a_batch_is_padded_on_the_device_without_a_copy() -> None:
    device = RecordingDevice()
    buffers = PinnedBuffers(device, (4, 2, 2, 3), memory := HostMemory(FakeDriver()))
    page = noise(3, 2)
    memory.register(page)
    before = copied_bytes.value
    (column,) = buffers.start(page, sums, 4).wait()
    assert device.sizes == [4] and copied_bytes.value == before
    np.testing.assert_array_equal(column[:3], page.astype(float).sum((1, 2, 3)))
    assert float(column[3]) == 7 * 12  # what the device's buffer had


@pytest.mark.parametrize("images", [16, 43, 63])
def test_a_model_on_registered_memory_copies_nothing(tmp_path: Path, images: int) -> None:
    """63 images in batches of 16: the last one is padded, as in a compiled model."""
    directory, pixels = make_checkpoint(tmp_path / "m", "vit", True), noise(images)
    job = job_for(directory, embeddings=[Embedding()], batch_size=16)
    expected = run(job, pixels)
    spec = identify(job)
    model = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 3), "cpu", 1)
    assert isinstance(model, TorchModel)
    model.sizes = (16, 8)
    model.compiled = dict.fromkeys(model.sizes, model.forward)
    memory = HostMemory(FakeDriver())
    device = RecordingDevice()
    model.buffers = PinnedBuffers(device, (16, *spec.pixels.shape, 3), memory)
    memory.register(pixels)
    before = copied_bytes.value
    found = model.predict(pixels)
    assert copied_bytes.value == before
    assert all(np.shares_memory(host.numpy(), pixels) for host in device.hosts)
    assert device.sizes == {16: [16], 43: [16, 16, 8, 3], 63: [16, 16, 16, 16]}[images]
    np.testing.assert_allclose(
        found.vectors["embedding"], expected.vectors["embedding"], rtol=1e-4, atol=1e-5
    )
    assert found.ids is not None and expected.ids is not None
    np.testing.assert_array_equal(found.ids[:, 0], expected.ids[:, 0])
