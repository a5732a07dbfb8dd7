"""Which shard goes to which worker. Pure: without clocks, threads or storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from vitray.pipeline.retry import RetryPolicy, Verdict

MOST_SHARDS = 512  # that one worker has at once, however small they are
LESS = 0.9  # by so much the mean size of shards falls until full workers are looked at again


@dataclass
class _WorkerState:
    """The shards that a worker has. is_alone: it has one that may end it, and gets no other."""

    shards_at_once: int
    images_at_once: int
    shards: set[str] = field(default_factory=set)
    is_alone: bool = False


class Schedule:
    """Shards on their way: waiting, with a worker, or ended.

    Workers are kept busy with few shards each: one that dies costs little, and none is idle at the
    end while another one has several.

    The driver asks after every event, and most events change nothing here. Only workers that may
    have room are looked at, so that an event costs the same with one worker and with a thousand.
    """

    def __init__(self, policy: RetryPolicy | None = None) -> None:
        self.policy = policy or RetryPolicy()
        self._waiting: deque[str] = deque()
        self._suspects: deque[str] = deque()
        self._workers: dict[str, _WorkerState] = {}
        self._owners: dict[str, str] = {}  # the worker of each shard in flight
        self._open: dict[str, None] = {}  # workers that may have room, in order
        self._wanted: int | None = None  # None where it may have changed
        self._images = 0  # of the shards that were read
        self._read = 0
        self._opened_mean = float("inf")  # their mean size when all workers were last opened

    @property
    def is_done(self) -> bool:
        return not (self._waiting or self._suspects or self._owners)

    @property
    def in_flight(self) -> set[str]:
        """The shards that workers have."""
        return set(self._owners)

    @property
    def wanted(self) -> int:
        """How many further shards the workers could be given now."""
        if self._wanted is None:
            states = [self._workers[worker] for worker in self._open]
            room = sum(self._room(state) for state in states if not state.is_alone)
            self._wanted = max(0, room - len(self._waiting))
        return self._wanted

    @property
    def workers(self) -> list[str]:
        return list(self._workers)

    def add(self, shards: Iterable[str]) -> None:
        self._waiting.extend(shards)
        self._wanted = None

    def worker_ready(self, worker: str, shards_at_once: int, images_at_once: int) -> None:
        """A worker can be given shards, or more of them than before."""
        shards = set(self.shards_of(worker))
        self._workers[worker] = _WorkerState(shards_at_once, images_at_once, shards)
        self._open_again(worker)

    def next_shards(self, are_last: bool = True) -> dict[str, list[str]]:
        """What to give to each worker now.

        are_last: whether no more shards will be added. Suspects come after all others.
        """
        given = dict[str, list[str]]()
        for worker in list(self._open):
            if not (self._waiting or self._suspects):
                break
            state = self._workers[worker]
            if shards := self._shards_for(state, are_last):
                state.shards.update(shards)
                self._owners.update(dict.fromkeys(shards, worker))
                self._wanted = None
                given[worker] = shards
            if state.is_alone or (state.shards and not self._room(state)):
                del self._open[worker]
        return given

    def _shards_for(self, state: _WorkerState, are_last: bool) -> list[str]:
        if self._suspects and not state.shards and not self._waiting and are_last:
            state.is_alone = True
            return [self._suspects.popleft()]
        if state.is_alone:
            return []
        count = min(self._room(state), self._fair_share(), len(self._waiting))
        return [self._waiting.popleft() for _ in range(count)]

    def _room(self, state: _WorkerState) -> int:
        """How many further shards a worker can have, by the mean size of those that ended."""
        most = state.shards_at_once
        if self._read:
            most = max(most, min(MOST_SHARDS, round(state.images_at_once / self._mean_images)))
        return max(0, most - len(state.shards))

    @property
    def _mean_images(self) -> float:
        """Of the shards that ended."""
        return max(1.0, self._images / self._read)

    def _fair_share(self) -> int:
        """Of the waiting shards, so that no worker takes the last ones from the others."""
        return -(-len(self._waiting) // max(1, len(self._workers)))

    def worker_stopped(self, worker: str) -> None:
        """It has finished what it read, and gets nothing more."""
        self._drop(worker)

    def shards_of(self, worker: str) -> list[str]:
        """The shards that a worker has."""
        state = self._workers.get(worker)
        return sorted(state.shards) if state else []

    def shard_read(self, images: int) -> None:
        """Learn how many images a shard has."""
        self._read += 1
        self._images += images
        if self._mean_images < LESS * self._opened_mean:  # every worker has more room
            self._opened_mean = self._mean_images
            for worker in self._workers:
                self._open_again(worker)

    def shard_committed(self, shard: str) -> None:
        self.policy.shard_committed(shard)
        self._release(shard)

    def shard_changed(self, shard: str) -> None:
        """It ends here: its new version is another shard."""
        self._release(shard)

    def shard_broken(self, shard: str) -> None:
        self.policy.shard_broken(shard)
        self._release(shard)

    def shard_failed(self, shard: str) -> Verdict:
        """It waits behind the others, or is set aside."""
        self._release(shard)
        verdict = self.policy.shard_failed(shard)
        if verdict is not Verdict.SET_ASIDE:
            self.add([shard])
        return verdict

    def shard_returned(self, shard: str) -> None:
        """It was not computed, for no fault of its own."""
        self._release(shard)
        self._waiting.appendleft(shard)
        self._wanted = None

    def worker_lost(
        self, worker: str, is_machine: bool, suspects: Collection[str] = ()
    ) -> dict[str, Verdict]:
        """Take back the shards of a worker. Returns the verdict about the one that is to blame."""
        ran_alone = worker in self._workers and self._workers[worker].is_alone
        shards = self._drop(worker)
        if is_machine:
            self._waiting.extendleft(reversed(shards))
            return {}
        own_suspects = [shard for shard in suspects if shard in shards]
        verdicts = self.policy.worker_died(shards, own_suspects, ran_alone)
        for shard, verdict in verdicts.items():
            if verdict is Verdict.AGAIN:
                self._waiting.append(shard)
            elif verdict is Verdict.ALONE:
                self._suspects.append(shard)
        return verdicts if ran_alone else {}

    @property
    def is_fatal(self) -> bool:
        """Whether another attempt at anything is in vain."""
        return self.policy.is_fatal(has_workers=bool(self._workers))

    def _release(self, shard: str) -> None:
        worker = self._owners.pop(shard, None)
        if worker is not None:
            state = self._workers[worker]
            state.shards.discard(shard)
            state.is_alone = False
            self._open_again(worker)

    def _open_again(self, worker: str) -> None:
        """It may have room."""
        self._open[worker] = None
        self._wanted = None

    def _drop(self, worker: str) -> list[str]:
        """Forget a worker. Returns the shards that it had."""
        shards = self.shards_of(worker)
        for shard in shards:
            del self._owners[shard]
        self._workers.pop(worker, None)
        self._open.pop(worker, None)
        self._wanted = None
        return shards
