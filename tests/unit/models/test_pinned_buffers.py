"""Pinned buffers: results in order, no slot overwritten while it is read."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from factories.small_models import job_for, make_checkpoint, noise, run
from vitray.errors import ModelError
from vitray.job import Embedding
from vitray.models import identify, open_model, vector_columns
from vitray.models.pinned_buffers import SLOTS, PinnedBuffers
from vitray.models.torch_engine import TorchModel
from vitray.schema import ModelOutputs


class LateDevice:
    """Streams in which nothing happens before somebody waits, or a later thing needs it. Memory for
    `room` images at once.
    """

    def __init__(self, room: int = 1000) -> None:
        self.room, self.lock = room, threading.RLock()
        self.todo: list = []  # (lane, what), in the order in which it was asked for
        self.launched: list[int] = []

    def buffers(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)

    def upload(self, host: torch.Tensor, there: torch.Tensor) -> LateEvent:
        return self._ask(lambda: there.copy_(host))

    def compute(
        self, work, pixels: torch.Tensor, after: LateEvent | None
    ) -> tuple[list[torch.Tensor], LateEvent]:
        if len(pixels) > self.room:
            raise torch.OutOfMemoryError("out of memory")
        columns: list[torch.Tensor] = []
        self.launched.append(len(pixels))
        return columns, self._ask(torch.inference_mode()(lambda: columns.extend(work(pixels))))

    def _ask(self, what) -> LateEvent:
        with self.lock:
            self.todo.append(what)
            return LateEvent(self, len(self.todo))


@dataclasses.dataclass
class LateEvent:
    device: LateDevice
    count: int

    def synchronize(self) -> None:
        with self.device.lock:
            for at in range(self.count):
                what, self.device.todo[at] = self.device.todo[at], lambda: None
                what()


def sums(pixels: torch.Tensor) -> list[torch.Tensor]:
    return [pixels.double().sum((1, 2, 3))]


def test_answers_come_in_order_and_no_slot_is_overwritten_while_it_is_read() -> None:
    ring, batches = (
        PinnedBuffers(LateDevice(), (4, 2, 2, 3)),
        [noise(n % 4 + 1, 2, n) for n in range(20)],
    )
    started = []
    for batch in batches:
        mine = batch.copy()
        started.append(ring.start(mine, sums))
        mine[:] = 0  # the caller's memory is its own again
        assert sum(not s.columns for s in started) <= SLOTS
    for batch, one in zip(batches, started):
        np.testing.assert_array_equal(one.wait()[0], batch.astype(float).sum((1, 2, 3)))


def test_threads_share_a_ring_and_each_gets_its_own_answers() -> None:
    ring, wrong = PinnedBuffers(LateDevice(), (4, 2, 2, 3)), []

    def call(seed: int) -> None:
        batches = [noise(3, 2, 1000 * seed + n) for n in range(60)]
        started = [ring.start(batch, sums) for batch in batches]
        for batch, one in zip(batches, started):
            if not np.array_equal(one.wait()[0], batch.astype(float).sum((1, 2, 3))):
                wrong.append(seed)

    threads = [threading.Thread(target=call, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_after_an_exception_the_ring_goes_on() -> None:
    def fail(_pixels: torch.Tensor) -> list[torch.Tensor]:
        raise ValueError("no such kernel")

    class Eager(LateDevice):
        def compute(self, work, pixels, after):  # a launch that fails does so at once
            after.synchronize()
            columns = work(pixels)
            return columns, self._ask(lambda: None)

    ring, batch = PinnedBuffers(Eager(), (4, 2, 2, 3)), noise(4, 2)
    for _ in range(2 * SLOTS):
        with pytest.raises(ValueError, match="no such kernel"):
            ring.start(batch, fail)
    np.testing.assert_array_equal(
        ring.start(batch, sums).wait()[0], batch.astype(float).sum((1, 2, 3))
    )


def test_a_tensor_that_is_there_already_takes_no_slot() -> None:
    device = LateDevice()
    ring, batch = PinnedBuffers(device, (4, 2, 2, 3)), torch.from_numpy(noise(9, 2))
    np.testing.assert_array_equal(ring.start(batch, sums).wait()[0], sums(batch)[0])
    assert len(device.todo) == 1


def with_ring(directory: str, device: LateDevice, **fields: object) -> TorchModel:
    job = job_for(directory, embeddings=[Embedding()], **fields)
    spec = identify(job)
    model = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 3), "cpu", 1)
    assert isinstance(model, TorchModel)
    model.buffers = PinnedBuffers(device, (spec.batch_size, *spec.pixels.shape, 3))
    return model


@pytest.mark.parametrize("room", [100, 8, 5, 1])
def test_a_model_on_the_ring_says_the_same_also_when_memory_makes_it_halve_its_batch(
    tmp_path: Path, room: int
) -> None:
    directory, pixels = make_checkpoint(tmp_path / "m", "vit", True), noise(43)
    expected = run(job_for(directory, embeddings=[Embedding()], top_k=3, batch_size=16), pixels)
    device = LateDevice(room)
    model = with_ring(directory, device, batch_size=16)
    found: list = []
    threads = [
        threading.Thread(target=lambda: found.append(model.predict(pixels))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    found.append(model.predict(torch.from_numpy(pixels)))
    assert len(found) == 3
    for one in found:
        np.testing.assert_array_equal(one.ids, expected.ids)
        np.testing.assert_allclose(one.scores, expected.scores, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            one.vectors["embedding"], expected.vectors["embedding"], rtol=1e-4, atol=1e-5
        )
    size = {100: 16, 8: 8, 5: 4, 1: 1}[room]  # two threads that fail at once halve it once
    assert model.sizes == (size,) and max(device.launched) == size


def test_one_image_too_many_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    model = with_ring(make_checkpoint(tmp_path / "m", "vit", True), LateDevice(0), batch_size=4)
    with pytest.raises(ModelError, match="one image needs more than its memory"):
        model.predict(noise(2))
