"""Decoding for a worker on other machines of a Ray cluster, which have no GPU.

A `DecoderActor` reads shards and returns blocks through Ray's object store. Pixels are written once
into the object, and the worker sees them there as a view.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vitray.dataset import Dataset
from vitray.decoding.decode import load_decoders
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.cluster import root_error
from vitray.pipeline.decoders import Outlets, Unread, read_blocks
from vitray.pipeline.events import (
    FragmentSkipped,
    ShardEnded,
    ShardFailed,
    ShardOutcome,
    ShardReturned,
)
from vitray.pipeline.ray_internals import streaming_call
from vitray.pipeline.stage_threads import StageThreads
from vitray.pipeline.stages import DecodedBlock, ShardEnd, decode_stage
from vitray.schema import Shard
from vitray.totals import copied_bytes

CALL_BYTES = 16 << 20  # of shards in one call: small ones share a block
POLL_S = 1.0  # how often a wait for the actor checks whether the worker stops
BLOCKS_AHEAD = 1  # of one stream: what an actor decodes before the worker takes it


class DecoderActor:
    """Reads and decodes on a machine without a GPU. Each call uses one core."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._stopping = threading.Event()
        load_decoders(dataset.job.decode)

    def is_up(self) -> bool:
        return True

    def stop(self) -> None:
        """Read nothing more; what was read is decoded."""
        self._stopping.set()

    def read(self, shards: Sequence[Shard]) -> Iterator[DecodedBlock | Unread | ShardOutcome]:
        """What a worker needs of these shards."""
        queue: BoundedQueue[Shard] = BoundedQueue(len(shards))
        for shard in shards:
            queue.put(shard)
        queue.finish()
        for item in read_blocks(self._dataset, queue, self._stopping):
            yield decode_stage(self._dataset, item) if isinstance(item, list) else item


@dataclass(frozen=True, slots=True)
class Feed:
    """How much a machine decodes for one worker. streams: calls at a time."""

    decoder: int
    worker: int
    streams: int


def pair_up(decoder_cpus: Sequence[int], workers: int) -> list[Feed]:
    """Which machine decodes for which worker, so that all workers get about the same.

    decoder_cpus: of each machine without a GPU.
    """
    if len(decoder_cpus) >= workers:
        return [Feed(n, n % workers, cpus) for n, cpus in enumerate(decoder_cpus)]
    feeds = list[Feed]()
    for n, cpus in enumerate(decoder_cpus):
        own = range(n, workers, len(decoder_cpus))
        streams = -(-cpus // len(own))
        feeds += [Feed(n, worker, streams) for worker in own]
    return feeds


class RemoteDecoders:
    """Takes shards from a worker's queue, and has them read and decoded by an actor.

    When the actor is lost, its shards are computed elsewhere; the worker goes on.
    """

    def __init__(
        self, actor: Any, streams: int, shards: BoundedQueue[Shard], outlets: Outlets
    ) -> None:
        self._actor = actor
        self._shards = shards
        self._outlets = outlets
        self._stopping = threading.Event()
        self._closed = threading.Event()
        self._threads = StageThreads(streams, self._read_all, outlets.lost)
        self._streams = streams

    def start(self, finished: Callable[[], None]) -> None:
        self._threads.start(finished)

    def stop(self) -> None:
        self._stopping.set()
        self._actor.stop.remote()

    def describe(self) -> str:
        return f"{self._streams} streams from another machine"

    def close(self) -> None:
        self._stopping.set()
        self._closed.set()

    def join(self, deadline: float) -> None:
        self._threads.join(deadline)

    def _read_all(self) -> None:
        import ray

        if not self._wait_until_up():
            return
        for first in self._shards:
            if self._stopping.is_set():
                return
            shards = [first]
            while sum(shard.size for shard in shards) < CALL_BYTES:
                if (more := self._shards.get_now()) is None:
                    break
                shards.append(more)
            unread = {shard.id for shard in shards}
            try:
                self._read(shards, unread)
            except ray.exceptions.RayTaskError as error:  # of our own code in the actor
                for shard_id in sorted(unread):
                    self._outlets.hand_on(ShardFailed(shard_id, str(root_error(error) or error)))
            except ray.exceptions.RayError:  # the actor or its machine is gone
                for shard_id in sorted(unread):
                    self._outlets.hand_on(ShardReturned(shard_id))
                return

    def _wait_until_up(self) -> bool:
        """Wait for the actor's machine: nothing is taken before. False: it never came."""
        import ray

        is_up = self._actor.is_up.remote()
        while not self._stopping.is_set():
            if ray.wait([is_up], timeout=POLL_S)[0]:
                with contextlib.suppress(ray.exceptions.RayError):
                    return bool(ray.get(is_up))
                return False
        return False

    def _read(self, shards: list[Shard], unread: set[str]) -> None:
        """Hand on what the actor makes of shards. unread: their ids; those that ended leave it."""
        import ray

        for reference in self._results(streaming_call(self._actor.read, BLOCKS_AHEAD, shards)):
            item = ray.get(reference)
            if isinstance(item, DecodedBlock):
                copied_bytes.add(item.size_bytes)  # into the object
                ended = [part.info.shard.id for part in item.fragments if part.info.end]
                self._outlets.decoded(item)
            else:
                ended = [] if isinstance(item, FragmentSkipped) else [_shard_id(item)]
                self._outlets.hand_on(item)
            unread.difference_update(ended)

    def _results(self, generator: Any) -> Iterator[Any]:
        """The references of a call's results as they come, until it ends or this is closed."""
        import ray

        while not self._closed.is_set():
            if ray.wait([generator], timeout=POLL_S)[0]:
                try:
                    yield next(generator)
                except StopIteration:
                    return


def _shard_id(item: ShardEnd | ShardEnded | ShardOutcome) -> str:
    return item.shard.id if isinstance(item, ShardEnd) else item.shard
