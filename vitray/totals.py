"""Totals of this process since its start: bytes of pixels copied, and images predicted.

Workers report how these have grown with their events.
"""

from __future__ import annotations

import threading


class Total:
    """A number that any thread may add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._value = 0

    def add(self, count: int) -> None:
        with self._lock:
            self._value += count

    @property
    def value(self) -> int:
        with self._lock:
            return self._value


# Copies on the host after the decoder's own write: into a block, to another process, into a pinned
# buffer.
copied_bytes = Total()
# Images that went through the model, counted after each batch: sooner than their fragments.
predicted_images = Total()
