"""The executor for one machine: a single worker, in the process of the run.

There, Ray costs more than it gives. Starting Ray and its workers takes two cores 8 s, and passing
shards and events between processes takes a little of each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vitray.dataset import Dataset
from vitray.errors import ClusterError, one_line
from vitray.job import Job
from vitray.models import identify
from vitray.pipeline.cluster import root_error
from vitray.pipeline.events import Event, WorkerLost
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.process_decoders import DecoderProcessDied
from vitray.pipeline.worker import Worker
from vitray.schema import ModelSpec, Shard


class LocalExecutor:
    """One worker. When a stage of it fails, it is closed, and another one begins."""

    workers = 1
    machines = 1

    def __init__(self, share: WorkerShare) -> None:
        self.share = share
        self._worker: Worker | None = None
        self._started = 0
        self._is_stopping = False

    def identify(self, job: Job, images: int, before_timing: Callable[[], None]) -> ModelSpec:
        return identify(job, images=images, before_timing=before_timing)

    def require_shared(self, out: str, inputs: list[str]) -> None:
        pass  # there is only this machine

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        if self._worker is not None:
            return
        self._dataset = dataset
        self.share = replace(self.share, compiled=compiled)
        self._start()

    def _start(self) -> None:
        self._started += 1
        self._name = f"worker {self._started}"
        self._worker = Worker(self._name, self._dataset, self.share)
        self._worker.start()

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        if self._worker is not None and worker == self._name:
            self._worker.give(shards)

    def events(self, wait_s: float) -> list[Event]:
        if self._worker is None:
            return []
        events = self._worker.events(wait_s)
        losses = [event for event in events if isinstance(event, WorkerLost)]
        if not losses:
            return events
        loss = self._final(losses[0])  # several threads may have failed, for the same reason
        loss.error.with_traceback(None)  # it refers to the worker, and so to its model
        if root_error(loss.error) is None:  # else the run ends
            self._worker.close()
            events += self._worker.events(0)  # what other threads had finished by then
            if not self._is_stopping:
                self._start()
        return [event for event in events if not isinstance(event, WorkerLost)] + [loss]

    def _final(self, loss: WorkerLost) -> WorkerLost:
        """The loss with an error that ends the run, where a worker in its place would fail, too.

        After an error of a GPU, this process cannot use it any more.
        """
        is_of_gpu = self.share.gpus and not isinstance(loss.error, DecoderProcessDied)
        if not is_of_gpu or root_error(loss.error) is not None:
            return loss
        why = one_line(loss.error, 300)
        text = f"the GPU cannot be used any more: {why}. Run the same command again to continue."
        return replace(loss, error=ClusterError(text))

    def stop(self) -> None:
        self._is_stopping = True
        if self._worker is not None:
            self._worker.stop()

    def is_waiting_for_machine(self) -> bool:
        return False

    def describe(self) -> str:
        return "" if self._worker is None else self._worker.describe()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
