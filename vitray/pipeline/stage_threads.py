"""The threads of one stage."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from vitray.pipeline.bounded_queue import QueueClosed


class StageThreads:
    """Threads that run the same function until its input ends.

    failed: gets an exception of a thread, except QueueClosed.
    """

    def __init__(
        self, threads: int, work: Callable[[], None], failed: Callable[[Exception], None]
    ) -> None:
        self._work = work
        self._failed = failed
        self._threads = [
            threading.Thread(target=self._run, name="vitray-stage", daemon=True)
            for _ in range(threads)
        ]
        self._more_threads = threading.Semaphore(threads - 1)  # acquired by each but the last

    def start(self, finished: Callable[[], None]) -> None:
        """finished: called once, by the last thread to end without an exception."""
        self._finished = finished
        for thread in self._threads:
            thread.start()

    def join(self, deadline: float) -> None:
        """Wait for the threads until a time of time.monotonic()."""
        for thread in self._threads:
            if thread.ident is not None:  # it was started
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            self._work()
            if not self._more_threads.acquire(blocking=False):
                self._finished()
        except QueueClosed:
            pass
        except Exception as error:
            self._failed(error)
