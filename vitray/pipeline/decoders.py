"""The first half of a worker: shards are read and decoded.

`ThreadDecoders` does it with threads of the worker's process, and child processes that decode. What
else decodes for a worker (other processes, other machines) takes shards from the same queue and
hands on the same things.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vitray.dataset import Dataset
from vitray.errors import count
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.events import FragmentSkipped, ShardEnded, ShardOutcome
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.stage_threads import StageThreads
from vitray.pipeline.stages import (
    DecodedBlock,
    EncodedFragment,
    ShardEnd,
    decode_stage,
    read_stage,
)
from vitray.schema import Shard

ENCODED_BYTES = 1 << 30  # of the images that wait to be decoded
Unread = ShardEnd | ShardEnded | FragmentSkipped


@dataclass(frozen=True)
class Outlets:
    """Where decoders put what they make.

    decoded: gets blocks. hand_on: gets what a shard has besides them. lost: gets an exception that
    ends the worker.
    """

    decoded: Callable[[DecodedBlock], None]
    hand_on: Callable[[Unread | ShardOutcome], None]
    lost: Callable[[Exception], None]


class Decoders(Protocol):
    """Takes shards from a queue, and puts what it makes into outlets."""

    def start(self, finished: Callable[[], None]) -> None:
        """Begin. `finished` is called once the queue is finished and everything is handed on."""

    def stop(self) -> None:
        """Read nothing more; decode what was read."""

    def describe(self) -> str:
        """Text: what waits here."""

    def close(self) -> None:
        """End at once; what is not handed on is lost."""

    def join(self, deadline: float) -> None:
        """Wait for the end until a time of time.monotonic()."""


class ThreadDecoders:
    """Reads and decodes with threads of this process; each block is one fragment."""

    def __init__(
        self, dataset: Dataset, shards: BoundedQueue[Shard], outlets: Outlets, share: WorkerShare
    ) -> None:
        self._dataset = dataset
        self._shards = shards
        self._outlets = outlets
        self._encoded: BoundedQueue[list[EncodedFragment]] = BoundedQueue(
            share.queue_blocks, ENCODED_BYTES
        )
        self._readers = StageThreads(share.readers, self._read_all, outlets.lost)
        self._decoders = StageThreads(share.decoders, self._decode_all, outlets.lost)
        self._stopping = threading.Event()

    def start(self, finished: Callable[[], None]) -> None:
        self._readers.start(self._encoded.finish)
        self._decoders.start(finished)

    def stop(self) -> None:
        self._stopping.set()

    def describe(self) -> str:
        return f"{count(len(self._encoded), 'block')} to decode"

    def close(self) -> None:
        self._stopping.set()
        self._encoded.close()

    def join(self, deadline: float) -> None:
        self._readers.join(deadline)
        self._decoders.join(deadline)

    def _read_all(self) -> None:
        for item in read_blocks(self._dataset, self._shards, self._stopping, joined=False):
            if isinstance(item, list):
                self._encoded.put(item, sum(fragment.info.size_bytes for fragment in item))
            else:
                self._outlets.hand_on(item)

    def _decode_all(self) -> None:
        for block in self._encoded:
            self._outlets.decoded(decode_stage(self._dataset, block))


class ShardSource(Protocol):
    """Where shards come from: a BoundedQueue, or the parent of this process."""

    def get_now(self) -> Shard | None:
        """The next shard if one waits, else None."""

    def get(self) -> Shard | None:
        """The next shard; wait for one. None once no more come."""


def read_blocks(
    dataset: Dataset, shards: ShardSource, stopping: threading.Event, *, joined: bool = True
) -> Iterator[list[EncodedFragment] | Unread | ShardOutcome]:
    """Read shards until the queue is finished or `stopping` is set.

    joined: a block has up to fragment_rows images of several small shards, so that they fill the
    batches of a GPU. Otherwise each fragment is a block, and the batches of a model follow from the
    source alone.
    """
    block = _Block(dataset.fragment_rows if joined else 0)
    while True:
        # Nothing that was read waits for a shard that may be long in coming.
        shard = shards.get() if block.is_empty else shards.get_now()
        if shard is None and (fragments := block.take()):
            yield fragments
            continue
        if shard is None or stopping.is_set():
            break
        for item in read_stage(dataset, shard):
            if stopping.is_set():
                break
            if not isinstance(item, EncodedFragment):
                yield item
            elif fragments := block.add(item):
                yield fragments
    if fragments := block.take():
        yield fragments


class _Block:
    """Fragments that are decoded and predicted together."""

    def __init__(self, most_images: int) -> None:
        self._most_images = most_images
        self._fragments: list[EncodedFragment] = []
        self._images = 0

    @property
    def is_empty(self) -> bool:
        return not self._fragments

    def add(self, fragment: EncodedFragment) -> list[EncodedFragment]:
        """Add a fragment. Returns a block that is full, or [].

        It is the one with this fragment if it is full now, or the one before if it had no room.
        """
        images = fragment.info.images
        full = self.take() if self._images + images > self._most_images else []
        self._fragments.append(fragment)
        self._images += images
        if not full and self._images >= self._most_images:
            return self.take()
        return full

    def take(self) -> list[EncodedFragment]:
        """The fragments so far; the block is empty afterwards."""
        fragments, self._fragments, self._images = self._fragments, [], 0
        return fragments
