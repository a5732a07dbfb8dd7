"""A worker: moves the shards that it is given through the four stages, and commits them.

There is one for each accelerator, or one for a machine without: in the process of the run, or in an
actor of Ray. Threads predict and write. On a CPU threads also read and decode, since the work is
done in child processes and outside Python's lock. For a GPU other processes do that
(process_decoders.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from vitray.dataset import Dataset
from vitray.decoding.decode import ON_DEVICE, load_decoders
from vitray.errors import count
from vitray.models import Model, open_model
from vitray.pipeline.bounded_queue import BoundedQueue, QueueClosed
from vitray.pipeline.decoders import Decoders, Outlets, ThreadDecoders, Unread
from vitray.pipeline.events import (
    Event,
    FragmentSkipped,
    FragmentWritten,
    ImagesPredicted,
    ShardEnded,
    ShardEvent,
    ShardOutcome,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.process_decoders import DecoderProcessDied, ProcessDecoders
from vitray.pipeline.stage_threads import StageThreads
from vitray.pipeline.stages import (
    DecodedBlock,
    FragmentRows,
    ShardEnd,
    commit_stage,
    open_device_decoder,
    predict_stage,
    write_shard_end,
    write_stage,
)
from vitray.schema import Shard
from vitray.totals import copied_bytes, predicted_images

if TYPE_CHECKING:
    from vitray.models.gpu_decode import DeviceDecoder

DECODED_BYTES = 4 << 30  # of the pixels that wait for the model
PREDICTORS = 2  # one prepares and packs while the other one's batches are computed
CLOSE_TIMEOUT_S = 30
POLL_S = 0.2  # how often a wait for the model checks whether the worker is closed
Opened = TypeVar("Opened")
Write = FragmentRows | Unread
MakeDecoders = Callable[[BoundedQueue[Shard], Outlets], Decoders]


class Worker:
    """Threads for every stage, with short queues between them.

    The model is opened while the first images are read.
    """

    def __init__(self, name: str, dataset: Dataset, share: WorkerShare) -> None:
        self._name = name
        self._dataset = dataset
        self._share = share
        self._events = _EventList()
        self._closed = threading.Event()
        self._coverage = Coverage()
        self._shards: BoundedQueue[Shard] = BoundedQueue(most_items=1 << 30)
        self._decoded: BoundedQueue[DecodedBlock] = BoundedQueue(share.queue_blocks, DECODED_BYTES)
        self._writes: BoundedQueue[Write] = BoundedQueue(share.queue_blocks)
        outlets = Outlets(self._put_decoded, self._hand_on, self._lose)
        self._outlets = outlets
        self._decoders = [_decoders(dataset, self._shards, outlets, share)]
        self._open_decoders = 1  # those that have not ended
        self._capacity = share.capacity(dataset.fragment_rows)
        self._changing = threading.Lock()  # for _decoders, _open_decoders, _capacity
        self._is_stopping = False
        self._model: Future[Model] | None = None
        self._decoder: Future[DeviceDecoder | None] | None = None
        self._predictors = StageThreads(PREDICTORS, self._predict_all, self._lose)
        self._writers = StageThreads(share.writers, self._write_all, self._lose)
        self._opener = ThreadPoolExecutor(1, "vitray-model")
        self._copied_bytes = copied_bytes.value
        self._predicted_before = self._predicted = predicted_images.value

    def start(self) -> None:
        """Begin to open the model, and say that shards may come."""
        dataset = self._dataset
        share = self._share
        load_decoders(dataset.job.decode)  # before other threads import: see decoding/resize.py
        model = (dataset.spec, dataset.outputs, dataset.job.device, share.threads, share.compiled)
        self._model = self._opener.submit(open_model, *model)
        self._decoder = self._opener.submit(open_device_decoder, dataset, share.threads)
        self._decoders[0].start(self._decoders_ended)
        self._predictors.start(self._writes.finish)
        self._writers.start(lambda: self._events.put(WorkerStopped(self._name)))
        self._events.put(WorkerReady(self._name, *self._capacity))

    def decode_also_by(self, make: MakeDecoders, shards: int) -> None:
        """Have further decoders take shards, such as those of another machine.

        shards: how many of them keep these decoders busy.
        """
        with self._changing:
            if self._is_stopping:
                return
            decoders = make(self._shards, self._outlets)
            self._decoders.append(decoders)
            self._open_decoders += 1
            own_shards, images = self._capacity
            self._capacity = own_shards + shards, images + shards * self._dataset.fragment_rows
            capacity = self._capacity
        decoders.start(self._decoders_ended)
        self._events.put(WorkerReady(self._name, *capacity))

    def _decoders_ended(self) -> None:
        with self._changing:
            self._open_decoders -= 1
            is_last = not self._open_decoders
        if is_last:
            self._decoded.finish()

    def give(self, shards: Sequence[Shard]) -> None:
        """Add shards to those that are read; nothing happens once it stops."""
        if self._is_stopping:
            return
        for shard in shards:
            self._coverage.begin(shard)
            self._shards.put(shard)

    def events(self, wait_s: float) -> list[Event]:
        """All that has happened since the last call; waits for something at most wait_s."""
        events = self._events.take(wait_s)
        predicted = predicted_images.value
        if predicted != self._predicted:
            self._predicted = predicted
            events.append(ImagesPredicted(self._name, predicted - self._predicted_before))
        return events

    def stop(self) -> None:
        """Stop reading, and finish what was read. WorkerStopped is the last event."""
        with self._changing:
            self._is_stopping = True
            all_decoders = list(self._decoders)
        for decoders in all_decoders:
            decoders.stop()
        self._shards.finish()

    def describe(self) -> str:
        """Text: how much waits for each stage."""
        decoding = ", ".join(decoders.describe() for decoders in self._decoders)
        return (
            f"{count(len(self._shards), 'shard')} to read, {decoding}, "
            f"{count(len(self._decoded), 'fragment')} to predict, {len(self._writes):,} to write"
        )

    def close(self) -> None:
        """End all threads within CLOSE_TIMEOUT_S; what they have not written is lost."""
        self._closed.set()
        for decoders in self._decoders:
            decoders.close()
        for queue in (self._shards, self._decoded, self._writes):
            queue.close()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for decoders in self._decoders:
            decoders.join(deadline)
        for threads in (self._predictors, self._writers):
            threads.join(deadline)
        if self._model is not None:  # when open_model ends, it sets the number of torch's threads
            wait([self._model], max(0.0, deadline - time.monotonic()))
        self._opener.shutdown(wait=False, cancel_futures=True)
        self._model = self._decoder = None  # a worker in its place needs the memory

    def _put_decoded(self, block: DecodedBlock) -> None:
        self._decoded.put(block, block.size_bytes)

    def _hand_on(self, item: Unread | ShardOutcome) -> None:
        if isinstance(item, ShardOutcome):
            self._coverage.forget(item.shard)
            self._events.put(item)
        else:
            self._writes.put(item)

    def _predict_all(self) -> None:
        while (block := self._decoded.get()) is not None:
            model, decoder = self._opened(self._model), self._opened(self._decoder)
            fragments = predict_stage(self._dataset, model, block, decoder)
            del block  # decoders wait for the memory of its pixels
            for fragment in fragments:
                self._writes.put(fragment)

    def _write_all(self) -> None:
        for item in self._writes:
            events: Sequence[ShardEvent]
            if isinstance(item, FragmentRows):
                events = write_stage(self._dataset, item)
            elif isinstance(item, ShardEnd):
                events = [write_shard_end(self._dataset, item)]
            else:
                events = [item]
            self._record(events)

    def _record(self, events: Sequence[ShardEvent]) -> None:
        """Report the events of a shard, and commit the shard if they complete it."""
        for event in events:
            if isinstance(event, FragmentWritten):
                event = replace(event, copied_bytes=self._newly_copied_bytes())
            self._events.put(event)
        if isinstance(outcome := events[-1], ShardOutcome):
            self._coverage.forget(outcome.shard)
        elif completed := self._coverage.completed_by(events):
            self._events.put(commit_stage(self._dataset, completed))

    def _newly_copied_bytes(self) -> int:
        with self._changing:
            before, self._copied_bytes = self._copied_bytes, copied_bytes.value
            return self._copied_bytes - before

    def _lose(self, error: Exception) -> None:
        suspects = error.shards if isinstance(error, DecoderProcessDied) else ()
        self._events.put(WorkerLost(self._name, error, suspects=suspects))

    def _opened(self, model: Future[Opened] | None) -> Opened:
        while model is not None and not self._closed.is_set():
            if wait([model], POLL_S).done:
                return model.result()
        raise QueueClosed


def _decoders(
    dataset: Dataset, shards: BoundedQueue[Shard], outlets: Outlets, share: WorkerShare
) -> Decoders:
    """What reads and decodes for a worker."""
    if share.decoder_processes and dataset.job.decode not in ON_DEVICE:
        return ProcessDecoders(dataset, shards, outlets, share)
    return ThreadDecoders(dataset, shards, outlets, share)


@dataclass
class _Covered:
    """What is known of one shard. fragments: {start: stop}. total: None before its end."""

    shard: Shard
    fragments: dict[int, int] = field(default_factory=dict)
    total: int | None = None

    @property
    def is_complete(self) -> bool:
        covered = 0
        while covered in self.fragments:
            covered = self.fragments[covered]
        return covered == self.total


class Coverage:
    """Which shards are complete, by their events. A commit checks the fragments again."""

    def __init__(self) -> None:
        self._shards: dict[str, _Covered] = {}
        self._lock = threading.Lock()

    def begin(self, shard: Shard) -> None:
        """Expect the events of a new attempt at a shard."""
        with self._lock:
            self._shards[shard.id] = _Covered(shard)

    def forget(self, shard_id: str) -> None:
        """Expect nothing more of a shard."""
        with self._lock:
            self._shards.pop(shard_id, None)

    def completed_by(self, events: Sequence[ShardEvent]) -> Shard | None:
        """Add events of one shard. Returns the shard once, when they complete it.

        None also for late events of an attempt that has ended.
        """
        with self._lock:
            known = self._shards.get(events[0].shard)
            if known is None:
                return None
            for event in events:
                if isinstance(event, ShardEnded):
                    known.total = event.end.total
                elif isinstance(event, (FragmentWritten, FragmentSkipped)):
                    known.fragments[event.start] = event.stop
            if not known.is_complete:
                return None
            del self._shards[known.shard.id]
            return known.shard


class _EventList:
    """Events in their order, from any thread."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def take(self, wait_s: float) -> list[Event]:
        with self._changed:
            self._changed.wait_for(lambda: self._events, wait_s)
            events, self._events = self._events, []
            return events
