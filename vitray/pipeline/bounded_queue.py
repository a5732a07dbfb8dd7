"""A queue between two stages that is bounded in items and in bytes, and that ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueClosed(Exception):
    """The queue was closed, or an item came after its end."""


class BoundedQueue(Generic[Item]):
    """First in, first out, for any number of threads.

    most_items, most_bytes: beyond either, `put` waits. An item that is larger than most_bytes fits
    into an empty queue.
    """

    def __init__(self, most_items: int, most_bytes: float = float("inf")) -> None:
        self._most_items = most_items
        self._most_bytes = most_bytes
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._is_finished = False
        self._is_closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item, size_bytes: int = 0) -> None:
        """Append an item; wait while the queue is full.

        Raises QueueClosed, also once the queue is finished: nobody would take the item.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._takes_nothing or self._has_room(size_bytes))
            if self._takes_nothing:
                raise QueueClosed
            self._items.append((item, size_bytes))
            self._bytes += size_bytes
            self._changed.notify_all()

    def get(self) -> Item | None:
        """The next item; wait for one. None once the queue is finished. Raises QueueClosed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._items or self._is_finished)
            if self._is_closed:
                raise QueueClosed
            if not self._items:
                return None
            item, size_bytes = self._items.popleft()
            self._bytes -= size_bytes
            self._changed.notify_all()
            return item

    def get_now(self) -> Item | None:
        """The next item if one waits, else None. Raises QueueClosed."""
        with self._changed:
            if self._is_closed:
                raise QueueClosed
            return self.get() if self._items else None

    def __iter__(self) -> Iterator[Item]:
        """The items until the queue is finished. Raises QueueClosed."""
        while (item := self.get()) is not None:
            yield item

    def finish(self) -> None:
        """Say that nothing more comes. A `put` that still waits ends with QueueClosed."""
        with self._changed:
            self._is_finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait, now and later, with QueueClosed."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()

    @property
    def _takes_nothing(self) -> bool:
        return self._is_closed or self._is_finished

    def _has_room(self, size_bytes: int) -> bool:
        fits = self._bytes + size_bytes <= self._most_bytes
        return not self._items or (len(self._items) < self._most_items and fits)
