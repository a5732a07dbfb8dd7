"""One round: shards through the line, each committed as soon as its fragments cover it, and what
the run remembers of it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from vitray.dataset import Commit, Dataset
from vitray.errors import ClusterError, ErrorRateExceeded, ObjectChanged, VitrayError
from vitray.job import Job
from vitray.pipeline.cluster import PLACE_S, SAID_S
from vitray.pipeline.metrics import Meter
from vitray.pipeline.progress import Progress
from vitray.schema import Shard, ShardEvent
from vitray.sources import Selection

log = logging.getLogger(__name__)

LOST_S = 30.0  # without an event, then whose machine is gone is planned again
ATTEMPTS = 3
JUDGED_IMAGES = 1000
COMMITS_AT_ONCE = 4


@dataclass
class Work:
    """What a run remembers while it works."""

    report: Callable[[Progress], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    attempts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    counted: dict[str, set[int]] = field(
        default_factory=dict
    )  # where the fragments start that `progress` has, by shard
    vanished: int = (
        0  # files that were deleted since they got their place in a shard: `missing`, but not bad
    )
    stop: threading.Event = field(
        default_factory=threading.Event
    )  # somebody wants the run to end soon
    selection: Selection = field(default_factory=Selection)
    run_id: str = field(
        default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    )


def blame(work: Work, shard_id: str, why: str, attempts: int = 1) -> None:
    """A shard failed; after ATTEMPTS it is set aside."""
    work.attempts[shard_id] = work.attempts.get(shard_id, 0) + attempts
    work.failures[shard_id] = why
    work.progress.set_aside = sum(count >= ATTEMPTS for count in work.attempts.values())


class MachineLostError(Exception):
    """What waits for that machine may wait for ever: plan the round again."""


class Executor(Protocol):
    """What brings shards through the four steps: processes of a Ray cluster (line.py), or threads
    of this one (local.py).
    """

    def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
        """Begin; put every event, then None, or what ended the line."""

    def stop(self) -> None:
        """Take no more images; end as if there were none."""

    def commit(self, shard_id: str) -> None:
        """Begin the commit of a shard whose fragments are there."""

    def commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        """What commits that ended within wait_s say. Raises what is not a VitrayError."""

    def is_short(self) -> bool:
        """Whether a machine that it began with is gone: what waits for that one may wait for
        ever.
        """

    def is_waiting(self) -> bool:
        """Whether the model has no room on any machine yet."""

    def state(self) -> str:
        """For people: what each step does and what waits for it."""

    def close(self) -> None:
        """End whatever still works, within seconds."""


def run_round(dataset: Dataset, shards: list[Shard], executor: Executor, work: Work) -> None:
    """Bring shards through the line and commit each as soon as its fragments cover it. Ends early
    when work.stop is set.
    """
    commits, coverage, blamed = (
        _Commits(executor, dataset.job.stall_timeout_s, work),
        _Coverage(),
        set[str](),
    )
    work.progress.waiting = executor.state
    with contextlib.closing(executor):
        for event in _events(executor, dataset.job.stall_timeout_s, work.stop):
            if event is None:
                pass
            elif event.kind == "changed":
                work.changed.add(event.shard)
            elif event.kind in ("failed", "broken"):
                blame(work, event.shard, event.message, ATTEMPTS if event.kind == "broken" else 1)
                blamed.add(event.shard)
            else:
                if event.message:
                    work.notes[event.shard] = event.message
                counted = work.counted.setdefault(event.shard, set())
                if (
                    coverage.add(event) and event.start not in counted
                ):  # not in an earlier round either
                    counted.add(event.start)
                    work.progress.add(event)
                    if event.kind == "fragment":
                        work.meter.fragment(event)
                    _judge(dataset.job, work.progress, work.vanished)
                if coverage.is_whole(event.shard):
                    commits.backlog.append(event.shard)
            commits.settle()
            work.progress.shards_staged = len(work.counted)
            work.report(work.progress)
        commits.wait()
    if work.stop.is_set():
        return
    for shard_id in (
        {shard.id for shard in shards}
        - work.commits.keys()
        - blamed
        - commits.missed
        - work.changed
    ):
        blame(work, shard_id, "its fragments did not arrive")


def _events(
    executor: Executor, patience_s: float, stop: threading.Event
) -> Iterator[ShardEvent | None]:
    """Events as they come, None once a second without one. Raises ClusterError after patience_s
    without any, beside PLACE_S at most without a place for the model; MachineLostError after LOST_S
    where a machine is gone.

    The patience begins anew with each event, and with each second in which the model has no place.
    """
    arrived: queue.Queue[ShardEvent | Exception | None] = queue.Queue()
    executor.start(arrived)
    last = received = said = time.monotonic()
    is_waiting = True  # until the first answer that it is not
    while True:
        if stop.is_set():
            executor.stop()
        try:
            item = arrived.get(timeout=1.0)
        except queue.Empty:
            now = time.monotonic()
            if now - last > LOST_S and executor.is_short():
                raise MachineLostError("a machine was lost") from None
            if is_waiting or now - last > min(patience_s / 2, SAID_S):
                is_waiting = executor.is_waiting()
            if is_waiting:
                last = now
                if now - received > PLACE_S:
                    raise ClusterError(
                        f"no machine had room for the model in {PLACE_S:g} s. Look at `ray "
                        f"status`, then run again."
                    ) from None
                if now - said > SAID_S:
                    log.warning(
                        "no machine has room for the model yet; waiting for one does not count as "
                        "standing still"
                    )
                    said = now
            if now - last > patience_s:
                raise ClusterError(
                    f"no image moved for {patience_s:g} s ({executor.state()}). Is the store "
                    f"slow, or the model stuck? On a cluster, `ray status` tells "
                    "more. Raise stall_timeout_s if that is how long it takes; run the same "
                    "command again to go on."
                ) from None
            yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        last = received = time.monotonic()
        is_waiting = False
        yield item


class _Coverage:
    """Which shards are whole, by events. The commit looks at the fragments themselves again."""

    def __init__(self) -> None:
        self._covered: dict[str, dict[int, int]] = {}
        self._totals: dict[str, int] = {}

    def add(self, event: ShardEvent) -> bool:
        """Take an event; True when it is the first of its fragment."""
        if event.kind == "end":
            self._totals[event.shard] = event.total
            return False
        fragments = self._covered.setdefault(event.shard, {})
        is_new = event.start not in fragments
        fragments[event.start] = event.stop
        return is_new

    def is_whole(self, shard_id: str) -> bool:
        """True once, with the event that makes the shard whole."""
        at, fragments = 0, self._covered.get(shard_id, {})
        while at in fragments:
            at = fragments[at]
        whole = self._totals.get(shard_id) == at
        if whole:
            del self._totals[shard_id]
        return whole


class _Commits:
    """Commits: a few at a time, each taken as it ends."""

    def __init__(self, executor: Executor, patience_s: float, work: Work) -> None:
        self.backlog: list[str] = []
        self.missed: set[str] = set()  # a fragment was gone
        self._executor, self._patience_s, self._work = executor, patience_s, work
        self._running = 0

    def settle(self, wait_s: float = 0) -> int:
        """Start what can start, take what ended within wait_s; returns how many ended."""
        while self.backlog and self._running < COMMITS_AT_ONCE:
            self._executor.commit(self.backlog.pop(0))
            self._running += 1
        ended = self._executor.commits(wait_s) if self._running else []
        self._running -= len(ended)
        for shard_id, answer in ended:
            self._take(shard_id, answer)
        return len(ended)

    def _take(self, shard_id: str, answer: Commit | VitrayError | None) -> None:
        work = self._work
        if isinstance(answer, ObjectChanged):
            work.changed.add(shard_id)
        elif isinstance(answer, VitrayError):
            raise answer
        elif isinstance(answer, Commit):
            work.commits[shard_id] = answer
            work.failures.pop(shard_id, None)
            work.counted.pop(shard_id, None)
            work.progress.shards_done += 1
            work.progress.shards_staged = len(work.counted)
            work.meter.commit(answer)
            log.info("committed %s: %d rows, %d errors", shard_id, answer.rows, answer.errors)
        else:
            blame(work, shard_id, "a fragment went missing")
            self.missed.add(shard_id)

    def wait(self) -> None:
        """Until all have ended. Raises ClusterError when none ends for patience_s."""
        deadline = time.monotonic() + self._patience_s
        while self.backlog or self._running:
            if self.settle(wait_s=1.0):
                deadline = time.monotonic() + self._patience_s
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no commit finished in {self._patience_s:g} s. Is the store slow? Run again "
                    f"to go on."
                )
            self._work.report(self._work.progress)


def _judge(job: Job, progress: Progress, vanished: int) -> None:
    bad = progress.errors - min(vanished, progress.reasons.get("missing", 0))
    if progress.images >= JUDGED_IMAGES and bad > job.max_error_rate * progress.images:
        worst = ", ".join(
            f"{n} {reason}"
            for reason, n in sorted(progress.reasons.items(), key=lambda item: -item[1])
        )
        raise ErrorRateExceeded(
            f"{bad} of {progress.images} images are bad ({worst}), more than "
            f"max_error_rate={job.max_error_rate:g}. "
            "Look at the source, or raise max_error_rate and run again; nothing further was "
            "committed."
        )
