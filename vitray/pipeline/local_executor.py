"""The executor for one machine without an accelerator: the stages are threads of this process.

There, Ray costs more than it gives. Starting Ray and its workers takes two cores 12 s, and passing
batches between processes takes a few percent. Images are still decoded in child processes
(decoding/isolation.py), and the model computes outside Python's lock. So threads share the cores as
well as processes would.
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
from vitray.pipeline.rounds import COMMITS_AT_ONCE, EventQueue
from vitray.pipeline.stages import (
    FragmentBatch,
    commit_or_error,
    decode_stage,
    predict_stage,
    read_stage,
    write_stage,
)
from vitray.schema import Shard

PREDICTORS = 2  # one prepares and packs while the other one's batches are computed
POLL_S = 0.2  # how often a waiting thread checks whether the executor is closed
CLOSE_TIMEOUT_S = 30


class _ClosedError(Exception):
    """The executor was closed while a thread waited."""


class LocalExecutor:
    """Threads for every stage, with short queues between them.

    The model is opened while the first images are read.
    """

    def __init__(self, dataset: Dataset, shards: list[Shard], shares: Shares) -> None:
        self._dataset = dataset
        self._shards = shards
        self._shares = shares
        self._stopped = threading.Event()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(COMMITS_AT_ONCE, "vitray-commit")
        self._running: dict[Future[Any], str] = {}
        self._opening: list[Future[Any]] = []

    def start(self, events: EventQueue) -> None:
        self._events = events
        dataset = self._dataset
        shares = self._shares
        load_decoders(dataset.job.decode)  # before other threads import: see decoding/resize.py
        model = self._open_model()
        shards: queue.Queue[Any] = queue.Queue()
        for shard in self._shards:
            shards.put(shard)
        shards.put(None)
        encoded = queue.Queue[Any](shares.queue_blocks)
        decoded = queue.Queue[Any](shares.queue_blocks)
        predicted = queue.Queue[Any](shares.queue_blocks)
        self._queues = {"decode": encoded, "predict": decoded, "write": predicted}

        def decode(batch: FragmentBatch) -> list[FragmentBatch]:
            return [decode_stage(dataset, batch)]

        def predict(batch: FragmentBatch) -> list[FragmentBatch]:
            return [predict_stage(dataset, self._opened(model), batch)]

        def write(batch: FragmentBatch) -> list[Any]:
            return [write_stage(dataset, batch).event]

        self._start_stage(shares.readers, shards, self._read, encoded)
        self._start_stage(shares.threads, encoded, decode, decoded)
        self._start_stage(PREDICTORS, decoded, predict, predicted)
        self._start_stage(shares.stagers, predicted, write, events)

    def stop(self) -> None:
        self._stopped.set()

    def start_commit(self, shard_id: str) -> None:
        shard = next(shard for shard in self._shards if shard.id == shard_id)
        self._running[self._pool.submit(commit_or_error, self._dataset, shard)] = shard_id

    def finished_commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        finished = wait(self._running, wait_s, return_when="FIRST_COMPLETED").done
        return [(self._running.pop(future), future.result()) for future in finished]

    def has_lost_machine(self) -> bool:
        return False

    def is_waiting_for_machine(self) -> bool:
        return False

    def describe(self) -> str:
        return ", ".join(
            f"{batches.qsize()} fragments wait for {stage}"
            for stage, batches in self._queues.items()
        )

    def close(self) -> None:
        self._closed.set()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        # When open_model ends, it sets the number of torch's threads.
        wait([*self._opening, *self._running], max(0.0, deadline - time.monotonic()))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _open_model(self) -> Future[Model]:
        dataset = self._dataset
        model = self._pool.submit(
            open_model,
            dataset.spec,
            dataset.outputs,
            dataset.job.device,
            self._shares.threads,
            self._shares.compiled,
        )
        self._opening.append(model)
        return model

    def _read(self, shard: Shard) -> Iterator[FragmentBatch]:
        batches = iter(()) if self._stopped.is_set() else read_stage(self._dataset, shard)
        return itertools.takewhile(lambda _: not self._stopped.is_set(), batches)

    def _start_stage(
        self,
        threads: int,
        inbox: queue.Queue[Any],
        work: Callable[[Any], Iterable[Any]],
        outbox: queue.Queue[Any],
    ) -> None:
        """Start threads that work on the items of the inbox until a None arrives.

        The last thread to end passes the None on.
        """
        more_threads = threading.Semaphore(threads - 1)  # acquired by each thread but the last

        def run() -> None:
            try:
                for item in iter(partial(self._take, inbox), None):
                    for result in work(item):
                        self._put(outbox, result)
                is_last = not more_threads.acquire(blocking=False)
                self._put(outbox if is_last else inbox, None)
            except _ClosedError:
                pass
            except Exception as error:
                self._events.put(error)

        for _ in range(threads):
            thread = threading.Thread(target=run, name="vitray-stage", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _opened(self, model: Future[Model]) -> Model:
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                return model.result(POLL_S)
        raise _ClosedError

    def _take(self, inbox: queue.Queue[Any]) -> Any:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                return inbox.get(timeout=POLL_S)
        raise _ClosedError

    def _put(self, outbox: queue.Queue[Any], item: Any) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return outbox.put(item, timeout=POLL_S)
        raise _ClosedError
