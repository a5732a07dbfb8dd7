"""One round: shards go through an executor, and each is committed once its fragments cover it."""

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
from vitray.pipeline.cluster import NOTICE_S, PLACEMENT_TIMEOUT_S, report_waiting
from vitray.pipeline.metrics import Meter
from vitray.pipeline.progress import Progress
from vitray.schema import EventKind, Reason, Shard, ShardEvent
from vitray.sources import Selection

log = logging.getLogger(__name__)

LOST_MACHINE_S = 30.0  # without an event; then the round is planned again if a machine is gone
ATTEMPTS = 3
RATED_IMAGES = 1000  # the error rate is checked from this many images on
COMMITS_AT_ONCE = 4
FAILURES = (EventKind.SHARD_FAILED, EventKind.SHARD_BROKEN)
EventQueue = queue.Queue[ShardEvent | Exception | None]


@dataclass
class RunState:
    """The options of a run, and what it remembers from round to round.

    counted: by shard, the starts of the fragments that `progress` includes.
    deleted_files: files of groups that no longer exist; `missing` rows, but not bad images.
    stop: set when the run should end soon.
    """

    started: float = field(default_factory=time.monotonic)
    prune: bool = False
    report: Callable[[Progress], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    attempts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    counted: dict[str, set[int]] = field(default_factory=dict)
    deleted_files: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    selection: Selection = field(default_factory=Selection)
    run_id: str = field(
        default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    )

    def record_failure(self, shard_id: str, why: str, attempts: int = 1) -> None:
        """Count failed attempts of a shard; after ATTEMPTS it is set aside."""
        self.attempts[shard_id] = self.attempts.get(shard_id, 0) + attempts
        self.failures[shard_id] = why
        self.progress.set_aside = sum(count >= ATTEMPTS for count in self.attempts.values())


class MachineLostError(Exception):
    """A machine is gone, and what waits for it may wait forever: plan the round again."""


class Executor(Protocol):
    """Moves shards through the four stages.

    RayExecutor uses the processes of a Ray cluster, LocalExecutor the threads of this process.
    """

    def start(self, events: EventQueue) -> None:
        """Begin. Put every event into the queue, then None or the exception that ended it."""

    def stop(self) -> None:
        """Stop reading; end as if the source had no further images."""

    def start_commit(self, shard_id: str) -> None:
        """Begin the commit of a shard whose fragments are staged."""

    def finished_commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        """The results of commits that end within wait_s. Raises what is not a VitrayError."""

    def has_lost_machine(self) -> bool:
        """Whether a machine that it began with is gone: what waits for it may wait forever."""

    def is_waiting_for_machine(self) -> bool:
        """Whether no machine has room for the model yet."""

    def describe(self) -> str:
        """Text: what each stage does, and how much waits for it."""

    def close(self) -> None:
        """End all work within seconds."""


def run_round(dataset: Dataset, shards: list[Shard], executor: Executor, state: RunState) -> None:
    """Move shards through the executor and commit each as soon as its fragments cover it.

    Ends early when state.stop is set. Raises what `arriving_events` raises, ErrorRateExceeded, and
    errors of commits.
    """
    timeout_s = dataset.job.stall_timeout_s
    commits = _Commits(executor, timeout_s, state)
    coverage = _Coverage()
    failed = set[str]()
    state.progress.waiting = executor.describe
    with contextlib.closing(executor):
        for event in arriving_events(executor, timeout_s, state.stop):
            if event is not None and event.kind in FAILURES:
                attempts = ATTEMPTS if event.kind == EventKind.SHARD_BROKEN else 1
                state.record_failure(event.shard, event.message, attempts)
                failed.add(event.shard)
            elif event is not None and event.kind == EventKind.SHARD_CHANGED:
                state.changed.add(event.shard)
            elif event is not None:
                _count(event, coverage, dataset.job, state)
                if coverage.is_complete(event.shard):
                    commits.backlog.append(event.shard)
            commits.settle()
            state.progress.shards_staged = len(state.counted)
            state.report(state.progress)
        commits.wait()
    if state.stop.is_set():
        return
    accounted = state.commits.keys() | failed | commits.without_fragment | state.changed
    for shard_id in {shard.id for shard in shards} - accounted:
        state.record_failure(shard_id, "its fragments did not arrive")


def _count(event: ShardEvent, coverage: _Coverage, job: Job, state: RunState) -> None:
    """Add an event of a fragment, or of a shard's end. Raises ErrorRateExceeded."""
    if event.message:
        state.notes[event.shard] = event.message
    counted = state.counted.setdefault(event.shard, set())
    if not coverage.add(event) or event.start in counted:  # counted in this or an earlier round
        return
    counted.add(event.start)
    state.progress.add(event)
    if event.kind == EventKind.FRAGMENT_WRITTEN:
        state.meter.fragment(event)
    _check_error_rate(job, state.progress, state.deleted_files)


def arriving_events(
    executor: Executor, stall_timeout_s: float, stop: threading.Event
) -> Iterator[ShardEvent | None]:
    """Events as they arrive; None once a second without one. Stops the executor when stop is set.

    Raises MachineLostError after LOST_MACHINE_S without an event when a machine is gone.
    Raises ClusterError after stall_timeout_s without an event. Seconds in which the model waits for
    a machine do not count; of these there may be PLACEMENT_TIMEOUT_S without an event.
    """
    events: EventQueue = queue.Queue()
    executor.start(events)
    watch = _StallWatch(executor, stall_timeout_s)
    while True:
        if stop.is_set():
            executor.stop()
        try:
            item = events.get(timeout=1.0)
        except queue.Empty:
            watch.check()
            yield None
            continue
        if item is None:
            return
        if isinstance(item, Exception):
            raise item
        watch.event_arrived()
        yield item


class _StallWatch:
    """How long nothing has moved, and whether that is too long."""

    def __init__(self, executor: Executor, stall_timeout_s: float) -> None:
        self._executor = executor
        self._timeout_s = stall_timeout_s
        started = time.monotonic()
        self._idle_since = started  # since the last event, or the last second of waiting for room
        self._last_event = started
        self._last_notice = started
        self._is_waiting = True  # for a machine, until the executor denies it

    def event_arrived(self) -> None:
        self._last_event = self._idle_since = time.monotonic()
        self._is_waiting = False

    def check(self) -> None:
        """Raises MachineLostError or ClusterError when it is too long."""
        moment = time.monotonic()
        if moment - self._idle_since > LOST_MACHINE_S and self._executor.has_lost_machine():
            raise MachineLostError("a machine was lost") from None
        if self._is_waiting or moment - self._idle_since > min(self._timeout_s / 2, NOTICE_S):
            self._is_waiting = self._executor.is_waiting_for_machine()
        if self._is_waiting:
            self._idle_since = moment
            self._check_placement(moment)
        if moment - self._idle_since > self._timeout_s:
            raise ClusterError(
                f"no image moved for {self._timeout_s:g} s ({self._executor.describe()}). Is the "
                "store slow, or the model stuck? On a cluster, `ray status` shows more. If your "
                "images need longer, raise stall_timeout_s. Run the same command again to continue."
            ) from None

    def _check_placement(self, moment: float) -> None:
        if moment - self._last_event > PLACEMENT_TIMEOUT_S:
            raise ClusterError(
                f"no machine had room for the model in {PLACEMENT_TIMEOUT_S:g} s. Look at `ray "
                "status`, then run again."
            ) from None
        if moment - self._last_notice > NOTICE_S:
            report_waiting("a machine with room for the model (this does not count as a stall)")
            self._last_notice = moment


class _Coverage:
    """Which shards are complete, by their events. A commit checks the fragments again."""

    def __init__(self) -> None:
        self._covered: dict[str, dict[int, int]] = {}
        self._totals: dict[str, int] = {}

    def add(self, event: ShardEvent) -> bool:
        """Add an event; True when it is the first of its fragment."""
        if event.kind == EventKind.SHARD_END:
            self._totals[event.shard] = event.total
            return False
        fragments = self._covered.setdefault(event.shard, {})
        is_new = event.start not in fragments
        fragments[event.start] = event.stop
        return is_new

    def is_complete(self, shard_id: str) -> bool:
        """True once, after the event that completes the shard."""
        fragments = self._covered.get(shard_id, {})
        covered = 0
        while covered in fragments:
            covered = fragments[covered]
        if self._totals.get(shard_id) != covered:
            return False
        del self._totals[shard_id]
        return True


class _Commits:
    """Commits: a few at a time, each result taken when it arrives."""

    def __init__(self, executor: Executor, timeout_s: float, state: RunState) -> None:
        self.backlog: list[str] = []
        self.without_fragment: set[str] = set()
        self._executor = executor
        self._timeout_s = timeout_s
        self._state = state
        self._running = 0

    def settle(self, wait_s: float = 0) -> int:
        """Start what can start, take the results of wait_s; returns their number."""
        while self.backlog and self._running < COMMITS_AT_ONCE:
            self._executor.start_commit(self.backlog.pop(0))
            self._running += 1
        finished = self._executor.finished_commits(wait_s) if self._running else []
        self._running -= len(finished)
        for shard_id, result in finished:
            self._take(shard_id, result)
        return len(finished)

    def _take(self, shard_id: str, result: Commit | VitrayError | None) -> None:
        state = self._state
        if isinstance(result, ObjectChanged):
            state.changed.add(shard_id)
        elif isinstance(result, VitrayError):
            raise result
        elif isinstance(result, Commit):
            state.commits[shard_id] = result
            state.failures.pop(shard_id, None)
            state.counted.pop(shard_id, None)
            state.progress.shards_done += 1
            state.progress.shards_staged = len(state.counted)
            state.meter.commit(result)
            log.info("committed %s: %d rows, %d errors", shard_id, result.rows, result.errors)
        else:
            state.record_failure(shard_id, "a fragment went missing")
            self.without_fragment.add(shard_id)

    def wait(self) -> None:
        """Wait for all commits. Raises ClusterError when none ends for the timeout."""
        deadline = time.monotonic() + self._timeout_s
        while self.backlog or self._running:
            if self.settle(wait_s=1.0):
                deadline = time.monotonic() + self._timeout_s
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"no commit finished in {self._timeout_s:g} s. Is the store slow? Run again "
                    "to continue."
                )
            self._state.report(self._state.progress)


def _check_error_rate(job: Job, progress: Progress, deleted_files: int) -> None:
    bad = progress.errors - min(deleted_files, progress.reasons.get(Reason.MISSING, 0))
    if progress.images >= RATED_IMAGES and bad > job.max_error_rate * progress.images:
        most_frequent = sorted(progress.reasons.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{count} {reason}" for reason, count in most_frequent)
        raise ErrorRateExceeded(
            f"{bad} of {progress.images} images are bad ({reasons}), more than "
            f"max_error_rate={job.max_error_rate:g}. Look at the source, or raise max_error_rate "
            "and run again; nothing further was committed."
        )
