"""The loop of a run: gives shards to workers, and takes what they report until every shard ended.

schedule.py decides which shard goes where and retry.py what a failure means; here is what needs
clocks and storage.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Protocol

from vitray.budget import Budget, Limit, Usage
from vitray.clock import utc_now
from vitray.dataset import (
    Commit,
    Dataset,
    Leases,
    committed_files,
    find_commit,
    new_run_id,
    uncommitted,
)
from vitray.errors import (
    ClusterError,
    CommitError,
    ErrorRateExceeded,
    JobError,
    StorageError,
    VitrayError,
    count,
)
from vitray.job import Job
from vitray.phases import Phase
from vitray.pipeline.cluster import NOTICE_S, PLACEMENT_TIMEOUT_S, report_waiting, root_error
from vitray.pipeline.events import (
    Event,
    FragmentEvent,
    FragmentSkipped,
    FragmentWritten,
    ImagesPredicted,
    ShardBroken,
    ShardChanged,
    ShardCommitted,
    ShardEnded,
    ShardFailed,
    ShardReturned,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from vitray.pipeline.machines import WorkerShare
from vitray.pipeline.metrics import Meter
from vitray.pipeline.partition import Partition, partition_first
from vitray.pipeline.progress import Progress
from vitray.pipeline.retry import Verdict
from vitray.pipeline.schedule import Schedule
from vitray.pipeline.source_listing import Gone
from vitray.schema import ModelSpec, Reason, Shard
from vitray.sources import Selection

log = logging.getLogger(__name__)

RATED_IMAGES = 1000  # the error rate is checked from this many images on
EVENT_WAIT_S = 1.0
CLAIM_S = 3.0  # shards are claimed for about this long
OTHERS_LOOK_S = 1.0  # between two looks at what other runs have committed, or longer:
OTHERS_LOOK_SHARE = 0.1  # of the time, at most, goes into looks
LOOK_WAIT_S = 0.2  # for a look that is short; workers are not kept waiting for a long one
STOP_TIMEOUT_S = 120.0  # for the fragments in flight
MOST_LOSSES = 4  # of workers, since the last commit, by errors of ours such as a store's


@dataclass
class RunState:
    """The options of a run, and what it remembers.

    started, started_at: when the run began, by time.monotonic() and as vitray stores it.
    counted: by shard, the starts of the fragments that `progress` includes.
    deleted_files: files of groups that no longer exist; `missing` rows, but not bad images.
    prune, agreed: remove rows whose input is gone, all of them or only what a user agreed to.
    pruned_files: those that this run removed from their groups.
    stop: set when the run should end soon.
    usage: what the run has used so far. ended_by: the limit of the budget at which it ends.
    is_recorded: whether its record was written, or tried to be.
    """

    started: float = field(default_factory=time.monotonic)
    started_at: str = field(default_factory=utc_now)
    prune: bool = False
    agreed: Gone | None = None
    report: Callable[[Progress], None] = lambda _: None
    progress: Progress = field(default_factory=Progress)
    meter: Meter = field(default_factory=Meter)
    schedule: Schedule = field(default_factory=Schedule)
    failures: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    counted: dict[str, set[int]] = field(default_factory=dict)
    deleted_files: int = 0
    pruned_files: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    budget: Budget = field(default_factory=Budget)
    usage: Usage = field(default_factory=Usage)
    ended_by: Limit | None = None
    is_recorded: bool = False
    partition: Partition = field(default_factory=lambda: Partition(0, 1))
    selection: Selection = field(default_factory=Selection)
    run_id: str = field(default_factory=new_run_id)

    @property
    def is_ending(self) -> bool:
        """Whether nothing more should be read."""
        return self.stop.is_set() or self.ended_by is not None

    def enter(self, phase: Phase) -> None:
        """Say what the run does from now on."""
        self.progress.phase = phase
        if phase is Phase.COMPUTING:
            self.progress.computing_since = time.monotonic()
        self.report(self.progress)

    def update_usage(self) -> None:
        """Count the time up to now."""
        self.usage.advance(time.monotonic() - self.started)


class Executor(Protocol):
    """Workers, each of which moves the shards that it is given through the four stages.

    LocalExecutor has one in this process, RayExecutor one for each GPU or machine of a cluster.
    """

    @property
    def share(self) -> WorkerShare:
        """What a worker has; where machines differ, the first one."""

    @property
    def workers(self) -> int:
        """The number of workers for which there are machines."""

    @property
    def machines(self) -> int:
        """The number of machines at this moment, with those that only decode."""

    def identify(self, job: Job, images: int, before_timing: Callable[[], None]) -> ModelSpec:
        """The job's model, on the kind of machine that will run it. Raises ModelError.

        images: about how many it will see; for few of them engines are not timed. before_timing:
        called before they are timed, where that is in this process.
        """

    def require_shared(self, out: str, inputs: list[str]) -> None:
        """Raise ClusterError where machines do not see the same local disks."""

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        """Open the model in every worker, now and in those that come later.

        Each reports WorkerReady when it can be given shards. When this is called again for the
        same dataset, workers stay as they are. compiled: compile the model.
        """

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        """Give further shards to a worker. If it is gone, nothing happens."""

    def events(self, wait_s: float) -> list[Event]:
        """What has happened since the last call; waits for something at most wait_s.

        A worker that is lost is replaced where there is room for it.
        """

    def stop(self) -> None:
        """Let workers finish what they have read, and read nothing more."""

    def is_waiting_for_machine(self) -> bool:
        """Whether there are workers that wait for room on a machine, and no others."""

    def describe(self) -> str:
        """Text: what each worker does, and how much waits for it."""

    def close(self) -> None:
        """End all work within seconds."""


def complete_shards(
    dataset: Dataset, shards: Sequence[Shard], executor: Executor, leases: Leases, state: RunState
) -> None:
    """Commit every shard, or record in `state` why it was not possible.

    The executor has begun. Ends early when state.stop is set. Raises ErrorRateExceeded,
    ClusterError when nothing moves or everything fails again and again, and the errors of workers
    that are VitrayErrors; then the executor is closed, so that it stages and commits nothing after
    the failure was recorded.
    """
    state.progress.waiting = executor.describe
    try:
        _Driver(dataset, shards, executor, leases, state).run()
    except BaseException:
        executor.close()
        raise


class _Driver:
    def __init__(
        self,
        dataset: Dataset,
        shards: Sequence[Shard],
        executor: Executor,
        leases: Leases,
        state: RunState,
    ) -> None:
        self._dataset = dataset
        self._shards = {shard.id: shard for shard in shards}
        self._executor = executor
        self._state = state
        self._schedule = state.schedule
        self._supply = _Supply(
            dataset, partition_first(self._shards, state.partition), leases, state.progress
        )
        self._watch = _StallWatch(executor, dataset.job.stall_timeout_s)
        self._last_loss: Exception = RuntimeError("no worker was lost")
        self._losses = 0  # since the last commit

    def run(self) -> None:
        while not self._is_done():
            self._state.usage.machines = self._executor.machines
            self._state.update_usage()
            self._state.ended_by = self._state.budget.reached(self._state.usage)
            if self._state.is_ending:
                return self._finish_in_flight()
            self._give()
            self._take_all(self._executor.events(EVENT_WAIT_S))
        policy = self._schedule.policy
        if policy.died_alone and not self._state.progress.computed:
            self._raise_fatal()

    def _is_done(self) -> bool:
        """Whether every shard has ended; those that are not in `out` after all are tried again."""
        if not self._schedule.is_done or not self._supply.is_empty:
            return False
        done = committed_files(self._dataset.out).keys()
        for shard_id in self._shards.keys() & self._state.commits.keys() - done:
            del self._state.commits[shard_id]
            self._state.progress.shards_done -= 1
            self._fail(
                shard_id,
                "a machine says it is committed, but it is not in `out`: do all machines see the "
                "same disk?",
            )
        return self._schedule.is_done

    def _give(self) -> None:
        if not self._supply.is_empty and (wanted := self._schedule.wanted):
            if claimed := self._supply.claim(wanted):
                self._schedule.add(claimed)
            if self._schedule.is_done and not self._supply.is_empty:
                # The remaining shards are those of other runs, which may commit them or die.
                self._watch.others_work()
        for worker, shard_ids in self._schedule.next_shards(self._supply.is_empty).items():
            self._executor.give(worker, [self._shards[shard_id] for shard_id in shard_ids])

    def _finish_in_flight(self) -> None:
        """Take what workers report until all have finished what they had read."""
        self._executor.stop()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._schedule.workers and time.monotonic() < deadline:
            self._take_all(self._executor.events(EVENT_WAIT_S))

    def _take_all(self, events: Sequence[Event]) -> None:
        for event in events:
            self._take(event)
        if events:
            self._watch.event_arrived()
        else:
            self._watch.check()
        state = self._state
        state.progress.shards_staged = len(state.counted)
        state.progress.set_aside = self._schedule.policy.set_aside
        state.report(state.progress)
        state.meter.progress(state.progress)

    def _take(self, event: Event) -> None:
        state = self._state
        match event:
            case FragmentWritten() | FragmentSkipped():
                self._count(event)
            case ShardEnded(shard, end):
                self._schedule.shard_read(end.total)
                if end.note:
                    state.notes[shard] = end.note
            case ShardCommitted(shard, commit):
                self._committed(shard, commit)
            case ShardFailed(shard, why):
                self._fail(shard, why)
            case ShardReturned(shard):
                self._schedule.shard_returned(shard)
            case ShardBroken(shard, why):
                self._schedule.shard_broken(shard)
                state.failures[shard] = why
                self._supply.ended(shard)
            case ShardChanged(shard):
                self._schedule.shard_changed(shard)
                state.changed.add(shard)
                self._supply.ended(shard)
            case ImagesPredicted(worker, images):
                state.progress.predicted[worker] = images
            case WorkerReady(worker, shards_at_once, images_at_once):
                self._schedule.worker_ready(worker, shards_at_once, images_at_once)
            case WorkerStopped(worker):
                self._schedule.worker_stopped(worker)
            case WorkerLost():
                self._lose(event)

    def _count(self, event: FragmentEvent) -> None:
        """Add a fragment, unless an earlier attempt did. Raises ErrorRateExceeded."""
        state = self._state
        counted = state.counted.setdefault(event.shard, set())
        if event.start in counted or event.shard in state.commits:
            return
        counted.add(event.start)
        state.progress.add(event)
        if isinstance(event, FragmentWritten):
            state.usage.fragments += 1
            state.meter.fragment(event)
        _check_error_rate(self._dataset.job, state.progress, state.deleted_files)

    def _committed(self, shard: str, commit: Commit) -> None:
        state = self._state
        self._losses = 0
        self._schedule.shard_committed(shard)
        self._supply.ended(shard)
        state.commits[shard] = commit
        if not commit.adopted:
            state.usage.shards += 1
        state.failures.pop(shard, None)
        state.counted.pop(shard, None)
        state.progress.shards_done += 1
        state.meter.commit(commit)
        log.info("committed %s: %d rows, %d errors", shard, commit.rows, commit.errors)

    def _fail(self, shard: str, why: str) -> None:
        self._state.failures[shard] = why
        if self._schedule.shard_failed(shard) is Verdict.SET_ASIDE:
            self._supply.ended(shard)  # another run may have more luck

    def _lose(self, event: WorkerLost) -> None:
        """Give the shards of a lost worker to others. Raises the error that no retry mends."""
        error = event.error.with_traceback(None)  # it refers to the worker, and so to its model
        self._losses += 1
        own = root_error(error)
        if own is not None and self._ends_run(own):
            raise type(own)(str(own).partition("\n")[0]) from error
        log.warning("a worker was lost (%s); its shards are planned again", last_line(error))
        self._take_lost_commits(self._schedule.shards_of(event.worker))
        is_faultless = event.is_machine or own is not None
        verdicts = self._schedule.worker_lost(event.worker, is_faultless, event.suspects)
        for shard, verdict in verdicts.items():
            self._state.failures[shard] = f"its processes died: {last_line(error)}"
            if verdict is Verdict.SET_ASIDE:
                self._supply.ended(shard)
        if not event.is_machine:
            self._last_loss = error
        self._watch.event_arrived()
        if self._schedule.is_fatal:
            self._raise_fatal()

    def _ends_run(self, error: VitrayError) -> bool:
        """Whether an error of one worker is one of all: the job's, or that of the last workers."""
        return (
            isinstance(error, (JobError, CommitError))
            or self._losses >= MOST_LOSSES
            or len(self._schedule.workers) < 2
        )

    def _take_lost_commits(self, shards: Sequence[str]) -> None:
        """Count the commits of a lost worker that it could not report."""
        try:
            pending = uncommitted(self._dataset, shards)
            for shard in set(shards) - set(pending):
                if commit := find_commit(self._dataset, shard):
                    self._committed(shard, commit)
        except StorageError as error:  # the shards are computed again, and their commits adopted
            log.warning("what a lost worker committed cannot be seen: %s", error)

    def _raise_fatal(self) -> None:
        alone = ", ".join(self._schedule.policy.died_alone[:3])
        also = f", also with {alone} alone" if alone else ""
        raise ClusterError(
            f"the run fails again and again{also}: {last_line(self._last_loss)}. "
            "Look at that (and at Ray's logs, where it runs on Ray) and at that input, then run "
            "again."
        ) from self._last_loss


class _Supply:
    """Shards that no worker was given yet. They are claimed, so that overlapping runs share them.

    Claims are made for CLAIM_S: each of them costs requests to the store.
    """

    def __init__(
        self, dataset: Dataset, shards: Sequence[str], leases: Leases, progress: Progress
    ) -> None:
        self._dataset = dataset
        self._unclaimed = dict.fromkeys(shards)
        self._leases = leases
        self._progress = progress
        self._had_others = False  # runs beside this one, which may have ended
        self._ended = 0
        self._claimed_at = float("-inf")
        self._look = _CommittedLook(dataset.out)

    @property
    def is_empty(self) -> bool:
        return not self._unclaimed

    def claim(self, wanted: int) -> list[str]:
        """At least `wanted` shards, if others do not have them and did not commit them."""
        moment = time.monotonic()
        has_others = self._leases.has_others
        self._had_others = self._had_others or has_others
        if has_others and moment - self._claimed_at < 0.1:
            return []
        if self._had_others:
            self._drop_committed()
        elapsed_s = max(0.1, moment - self._claimed_at)
        count = max(wanted, int(self._ended * CLAIM_S / elapsed_s))
        claimed = self._leases.claim(self._unclaimed, count)
        self._claimed_at = moment
        self._ended = 0
        for shard in claimed:
            del self._unclaimed[shard]
        return self._still_pending(claimed) if self._had_others else claimed

    def ended(self, shard: str) -> None:
        self._ended += 1
        self._leases.release([shard])

    def _drop_committed(self) -> None:
        """Forget the shards that other runs have committed, by a look now and then."""
        committed = self._unclaimed.keys() & self._look.latest()
        for shard in committed:
            del self._unclaimed[shard]
        self._progress.shards_done += len(committed)

    def _still_pending(self, claimed: Sequence[str]) -> list[str]:
        """Those that no other run committed, before it released them and they were claimed."""
        try:
            pending = uncommitted(self._dataset, claimed)
        except StorageError as error:  # a look only saves work
            log.warning("what other runs committed cannot be seen: %s", error)
            return list(claimed)
        self._leases.release(set(claimed) - set(pending))
        self._progress.shards_done += len(claimed) - len(pending)
        return pending


class _CommittedLook:
    """Which shards are committed, by listing the data files again and again.

    Another thread lists them, since a listing of a million files takes a minute.
    """

    def __init__(self, out: str) -> None:
        self._out = out
        self._listing: Future[Set[str]] | None = None
        self._due_at = float("-inf")

    def latest(self) -> Set[str]:
        """The result of a look, once for each look; nothing between them."""
        if self._listing is None and time.monotonic() >= self._due_at:
            self._listing = Future()
            threading.Thread(target=self._list, args=(self._listing,), daemon=True).start()
        if self._listing is None or not wait([self._listing], LOOK_WAIT_S).done:
            return frozenset()
        committed = self._listing.result()
        self._listing = None
        return committed

    def _list(self, listing: Future[Set[str]]) -> None:
        started = time.monotonic()
        committed: Set[str] = frozenset()
        try:
            committed = committed_files(self._out).keys()
        except StorageError as error:  # a look only saves work
            log.warning("what other runs committed cannot be seen: %s", error)
        except Exception as error:
            listing.set_exception(error)
            return
        took_s = time.monotonic() - started
        self._due_at = started + max(OTHERS_LOOK_S, took_s / OTHERS_LOOK_SHARE)
        listing.set_result(committed)


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

    def others_work(self) -> None:
        """Only shards of other runs remain, which is no stall."""
        moment = time.monotonic()
        self._last_event = self._idle_since = moment
        if moment - self._last_notice > NOTICE_S:
            log.warning("waiting for another run of this job, which has the remaining shards")
            self._last_notice = moment

    def check(self) -> None:
        """Raises ClusterError when it is too long."""
        moment = time.monotonic()
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
            )

    def _check_placement(self, moment: float) -> None:
        if moment - self._last_event > PLACEMENT_TIMEOUT_S:
            raise ClusterError(
                f"no machine had room for the model in {PLACEMENT_TIMEOUT_S:g} s. Look at `ray "
                "status`, then run again."
            )
        if moment - self._last_notice > NOTICE_S:
            report_waiting("a machine with room for the model (this does not count as a stall)")
            self._last_notice = moment


def _check_error_rate(job: Job, progress: Progress, deleted_files: int) -> None:
    bad = progress.errors - min(deleted_files, progress.reasons.get(Reason.MISSING, 0))
    if progress.images >= RATED_IMAGES and bad > job.max_error_rate * progress.images:
        most_frequent = sorted(progress.reasons.items(), key=lambda item: -item[1])
        reasons = ", ".join(f"{count} {reason}" for reason, count in most_frequent)
        raise ErrorRateExceeded(
            f"{bad:,} of {count(progress.images, 'image')} are bad ({reasons}), more than "
            f"max_error_rate={job.max_error_rate:g}. Look at the source, or raise max_error_rate "
            "and run again; nothing further was committed."
        )


def last_line(error: BaseException) -> str:
    """The last line of an error's text, shortened."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
