"""A queue between stages: bounded in items and bytes, and never a thread that waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from vitray.pipeline.bounded_queue import BoundedQueue, QueueClosed

WAITS_S = 0.1  # a thread that did not end by then waits
ENDS_S = 10.0


class Started(threading.Thread):
    """A thread that runs a function, and what that returned or raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.result: object = None
        self._work = work
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except QueueClosed as error:
            self.result = error

    def waits(self) -> bool:
        self.join(WAITS_S)
        return self.is_alive()

    def ended(self) -> object:
        self.join(ENDS_S)
        assert not self.is_alive()
        return self.result


def test_items_come_in_their_order() -> None:
    queue = BoundedQueue[int](most_items=10)
    for n in range(5):
        queue.put(n)
    assert len(queue) == 5 and [queue.get() for _ in range(5)] == [0, 1, 2, 3, 4]


def test_put_waits_while_there_are_most_items() -> None:
    queue = BoundedQueue[int](most_items=2)
    queue.put(1)
    queue.put(2)
    putter = Started(lambda: queue.put(3))
    assert putter.waits() and len(queue) == 2
    assert queue.get() == 1
    putter.ended()
    assert [queue.get(), queue.get()] == [2, 3]


@pytest.mark.parametrize(
    ("present", "size", "waits"),
    [([40], 60, False), ([40], 61, True), ([40, 60], 0, False), ([100], 1, True), ([], 999, False)],
)
def test_put_waits_while_there_are_most_bytes(present: list[int], size: int, waits: bool) -> None:
    """But an item that is larger than all bytes fits into an empty queue."""
    queue = BoundedQueue[int](most_items=10, most_bytes=100)
    for present_size in present:
        queue.put(present_size, present_size)
    putter = Started(lambda: queue.put(size, size))
    assert putter.waits() == waits
    for present_size in present:
        assert queue.get() == present_size
    putter.ended()
    assert queue.get() == size


def test_bytes_are_freed_one_large_item_at_a_time() -> None:
    queue = BoundedQueue[int](most_items=10, most_bytes=100)
    queue.put(1, 1000)
    putter = Started(lambda: queue.put(2, 1000))
    assert putter.waits()
    assert queue.get() == 1
    putter.ended()
    last = Started(lambda: queue.put(3, 1))
    assert last.waits()
    assert [queue.get(), queue.get()] == [2, 3]
    last.ended()


def test_get_waits_for_an_item() -> None:
    queue = BoundedQueue[int](most_items=1)
    getter = Started(queue.get)
    assert getter.waits()
    queue.put(7)
    assert getter.ended() == 7


def test_get_now_does_not_wait() -> None:
    queue = BoundedQueue[int](most_items=2)
    assert queue.get_now() is None
    queue.put(7)
    assert queue.get_now() == 7 and queue.get_now() is None
    queue.close()
    with pytest.raises(QueueClosed):
        queue.get_now()


def test_a_finished_queue_gives_what_it_has_and_then_none_to_everyone() -> None:
    queue = BoundedQueue[int](most_items=5)
    queue.put(1)
    queue.put(2)
    queue.finish()
    assert [queue.get() for _ in range(4)] == [1, 2, None, None]


def test_iteration_ends_when_the_queue_is_finished() -> None:
    queue = BoundedQueue[int](most_items=5)
    reader = Started(lambda: list(queue))
    queue.put(1)
    queue.put(2)
    assert reader.waits()
    queue.finish()
    assert reader.ended() == [1, 2]


def test_finish_wakes_every_waiter() -> None:
    queue = BoundedQueue[int](most_items=1)
    getters = [Started(queue.get) for _ in range(5)]
    assert getters[0].waits()
    queue.finish()
    assert [getter.ended() for getter in getters] == [None] * 5


@pytest.mark.parametrize("waits", [True, False])
def test_put_after_finish_is_refused(waits: bool) -> None:
    queue = BoundedQueue[int](most_items=1)
    queue.put(0)
    if waits:
        putter = Started(lambda: queue.put(1))
        assert putter.waits()
    queue.finish()
    if not waits:
        putter = Started(lambda: queue.put(1))
    assert isinstance(putter.ended(), QueueClosed)
    assert list(queue) == [0]


@pytest.mark.parametrize("full", [True, False])
def test_close_wakes_every_waiter_now_and_later(full: bool) -> None:
    queue = BoundedQueue[int](most_items=1)
    if full:
        queue.put(0)
    waiters = [Started((lambda: queue.put(1)) if full else queue.get) for _ in range(5)]
    assert all(waiter.waits() for waiter in waiters)
    queue.close()
    assert all(isinstance(waiter.ended(), QueueClosed) for waiter in waiters)
    with pytest.raises(QueueClosed):
        queue.put(1)
    with pytest.raises(QueueClosed):
        queue.get()
    queue.finish()
    with pytest.raises(QueueClosed):
        queue.get()


def test_many_threads_lose_and_double_nothing() -> None:
    queue = BoundedQueue[int](most_items=3, most_bytes=20)
    found: list[int] = []

    def put(first: int) -> None:
        for n in range(first, first + 200):
            queue.put(n, n % 9)

    getters = [Started(lambda: found.extend(queue)) for _ in range(3)]
    putters = [Started(lambda first=first: put(first)) for first in range(0, 1000, 200)]
    deadline = time.monotonic() + ENDS_S
    for putter in putters:
        putter.join(max(0.0, deadline - time.monotonic()))
    queue.finish()
    for getter in getters:
        getter.ended()
    assert sorted(found) == list(range(1000)) and len(queue) == 0
