"""Counts the bytes of pixels that this process copied on the host.

Counted are copies after the decoder's own write: into a block, to another process, into a pinned
buffer. Worker processes report the growth of their total with their events.
"""

from __future__ import annotations

import threading


class _Total:
    """The bytes that all threads of this process copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.size_bytes = 0


_process = _Total()


def count_copy(size_bytes: int) -> None:
    """Add a copy to the total of this process. Any thread may call it."""
    with _process.lock:
        _process.size_bytes += size_bytes


def copied_bytes() -> int:
    """The bytes that this process has copied since its start."""
    with _process.lock:
        return _process.size_bytes
