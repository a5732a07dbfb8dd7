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

import numpy as np

from vitray.copies import count_copy
from vitray.dataset import Dataset
from vitray.decoding.decode import load_decoders
from vitray.errors import one_line
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.decoders import Outlets, Unread, read_blocks
from vitray.pipeline.events import FragmentSkipped, ShardEnded, ShardFailed, ShardOutcome
from vitray.pipeline.stage_threads import StageThreads
from vitray.pipeline.stages import DecodedBlock, ShardEnd, decode_stage
from vitray.schema import Shard

SHARDS_PER_CALL = 4  # small ones share a block
POLL_S = 1.0  # how often a wait for the actor checks whether the worker stops
BLOCKS_AHEAD = 2  # of one stream: what an actor decodes before the worker takes it


class DecoderActor:
    """Reads and decodes on a machine without a GPU. Each call uses one core."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        load_decoders(dataset.job.decode)

    def is_up(self) -> bool:
        return True

    def read(self, shards: Sequence[Shard]) -> Iterator[DecodedBlock | Unread | ShardOutcome]:
        """What a worker needs of these shards."""
        queue: BoundedQueue[Shard] = BoundedQueue(len(shards))
        for shard in shards:
            queue.put(shard)
        queue.finish()
        for item in read_blocks(self._dataset, queue, threading.Event()):
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

    When the actor is lost, its shards fail and are tried again elsewhere; the worker goes on.
    """

    def __init__(
        self, actor: Any, streams: int, shards: BoundedQueue[Shard], outlets: Outlets
    ) -> None:
        self._actor = actor
        self._shards = shards
        self._outlets = outlets
        self._stopping = threading.Event()
        self._threads = StageThreads(streams, self._read_all, outlets.lost)
        self._streams = streams

    def start(self, finished: Callable[[], None]) -> None:
        self._threads.start(finished)

    def stop(self) -> None:
        self._stopping.set()

    def describe(self) -> str:
        return f"{self._streams} streams from another machine"

    def close(self) -> None:
        self._stopping.set()

    def join(self, deadline: float) -> None:
        self._threads.join(deadline)

    def _read_all(self) -> None:
        import ray

        if not self._wait_until_up():
            return
        for first in self._shards:
            shards = [first]
            while len(shards) < SHARDS_PER_CALL and (more := self._shards.get_now()) is not None:
                shards.append(more)
            unread = {shard.id for shard in shards}
            try:
                self._read(shards, unread)
            except ray.exceptions.RayError as error:
                why = f"the machine that decoded it was lost: {one_line(error, 200)}"
                for shard_id in sorted(unread):
                    self._outlets.hand_on(ShardFailed(shard_id, why))
                return  # nothing more comes from there

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

        method = self._actor.read.options(
            num_returns="streaming", _generator_backpressure_num_objects=BLOCKS_AHEAD
        )
        for reference in method.remote(shards):
            if self._stopping.is_set():
                return
            item = ray.get(reference)
            if isinstance(item, DecodedBlock):
                if isinstance(item.pixels, np.ndarray):
                    count_copy(item.pixels.nbytes)  # into the object
                ended = [part.info.shard.id for part in item.fragments if part.info.end]
                self._outlets.decoded(item)
            else:
                ended = [] if isinstance(item, FragmentSkipped) else [_shard_id(item)]
                self._outlets.hand_on(item)
            unread.difference_update(ended)


def _shard_id(item: ShardEnd | ShardEnded | ShardOutcome) -> str:
    return item.shard.id if isinstance(item, ShardEnd) else item.shard
