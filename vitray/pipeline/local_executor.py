"""The line as threads of this process: for one machine without an accelerator, where Ray would cost
more than it gives.

Starting Ray and its workers takes two cores 12 s, passing batches between processes a few percent.
Images are still decoded in children (isolation.py), and the model computes outside Python's lock,
so threads share the cores as well as processes would.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from vitray.dataset import Commit, Dataset
from vitray.decoding.decode import load_decoders
from vitray.errors import VitrayError
from vitray.models import Model, open_model
from vitray.pipeline.cluster import Shares
from vitray.pipeline.rounds import COMMITS_AT_ONCE
from vitray.pipeline.stages import (
    FragmentBatch,
    commit_step,
    decode_step,
    predict_step,
    read_step,
    stage_step,
)
from vitray.schema import Shard, ShardEvent

PREDICTORS = 2  # one prepares and packs while the other's batches are computed
LOOK_S = 0.2  # how often a thread that waits looks whether the line is closed


class _ClosedError(Exception):
    """The line was closed while a thread waited."""


class LocalExecutor:
    """Threads for every step, with short queues between them; the model is opened while the first
    images are read.
    """

    def __init__(self, dataset: Dataset, shards: list[Shard], shares: Shares) -> None:
        self._dataset, self._shards, self._shares = dataset, shards, shares
        self._stopped, self._closed = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(COMMITS_AT_ONCE, "vitray-commit")
        self._running: dict[Future[Any], str] = {}
        self._opening: list[Future[Any]] = []

    def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
        dataset, job, shares = self._dataset, self._dataset.job, self._shares
        load_decoders(job.decode)  # before other threads import: see vitray/resize.py
        model = self._pool.submit(
            open_model,
            dataset.spec,
            list(dataset.vectors),
            job.top_k,
            job.labelled,
            job.device,
            shares.threads,
            shares.compiled,
        )
        self._opening.append(model)
        shards: queue.Queue[Any] = queue.Queue()
        for shard in [*self._shards, None]:
            shards.put(shard)
        encoded, decoded, predicted = (queue.Queue[Any](shares.queue_blocks) for _ in range(3))
        self._queues = {"decode": encoded, "predict": decoded, "stage": predicted}
        self._arrived = arrived
        self._step(shares.readers, shards, self._read, encoded)
        self._step(shares.threads, encoded, lambda batch: [decode_step(dataset, batch)], decoded)
        self._step(
            PREDICTORS,
            decoded,
            lambda batch: [predict_step(dataset, self._opened(model), batch)],
            predicted,
        )
        self._step(
            shares.stagers, predicted, lambda batch: [stage_step(dataset, batch).event], arrived
        )

    def stop(self) -> None:
        self._stopped.set()

    def commit(self, shard_id: str) -> None:
        shard = next(shard for shard in self._shards if shard.id == shard_id)
        self._running[self._pool.submit(commit_step, self._dataset, shard)] = shard_id

    def commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        ended = wait(self._running, wait_s, return_when="FIRST_COMPLETED").done
        return [(self._running.pop(future), future.result()) for future in ended]

    def is_short(self) -> bool:
        return False

    def is_waiting(self) -> bool:
        return False

    def state(self) -> str:
        return ", ".join(
            f"{waiting.qsize()} fragments wait for {step}" for step, waiting in self._queues.items()
        )

    def close(self) -> None:
        self._closed.set()
        deadline = time.monotonic() + 30
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # a model that is being opened sets torch's threads at its end
        wait([*self._opening, *self._running], max(0.0, deadline - time.monotonic()))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, shard: Shard) -> Iterator[FragmentBatch]:
        batches = iter(()) if self._stopped.is_set() else read_step(self._dataset, shard)
        return itertools.takewhile(lambda _: not self._stopped.is_set(), batches)

    def _step(
        self,
        threads: int,
        inbox: queue.Queue[Any],
        work: Callable[[Any], Iterable[Any]],
        outbox: queue.Queue[Any],
    ) -> None:
        """So many threads that work on what is in the inbox, until a None comes; the last of them
        passes it on.
        """
        others = threading.Semaphore(threads - 1)

        def live() -> None:
            try:
                for item in iter(partial(self._take, inbox), None):
                    for made in work(item):
                        self._put(outbox, made)
                last = not others.acquire(blocking=False)
                self._put(outbox if last else inbox, None)
            except _ClosedError:
                pass
            except Exception as error:
                self._arrived.put(error)

        for _ in range(threads):
            self._threads.append(threading.Thread(target=live, name="vitray-step", daemon=True))
            self._threads[-1].start()

    def _opened(self, model: Future[Model]) -> Model:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                return model.result(LOOK_S)
        raise _ClosedError

    def _take(self, inbox: queue.Queue[Any]) -> Any:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                return inbox.get(timeout=LOOK_S)
        raise _ClosedError

    def _put(self, outbox: queue.Queue[Any], item: Any) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return outbox.put(item, timeout=LOOK_S)
        raise _ClosedError
