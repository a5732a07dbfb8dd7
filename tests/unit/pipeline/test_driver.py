"""The loop of a run: what it does when workers die, say nothing, or wait for a machine.

There is no model, no Ray, and no thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pytest

from factories import hand_made
from vitray.dataset import Dataset, Leases, commit_shard, committed_files, list_staged
from vitray.errors import ClusterError, ErrorRateExceeded, ModelError
from vitray.job import Job
from vitray.pipeline import driver
from vitray.pipeline.driver import RunState, complete_shards
from vitray.pipeline.events import (
    Event,
    FragmentSkipped,
    FragmentWritten,
    ShardBroken,
    ShardChanged,
    ShardCommitted,
    ShardEnded,
    ShardFailed,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
)
from vitray.pipeline.machines import local_share
from vitray.pipeline.runner import finish_run
from vitray.schema import End, ModelSpec, Shard
from vitray.sources import list_shards
from vitray.storage import store_for

SHARDS = 12
AT_ONCE = 4


class DrawnExecutor:
    """Workers that stage generated rows: at each call of `events`, one step of one shard.

    A worker dies at a shard of `deadly`, and with it the shards that it had. After a death another
    worker begins. given: the shards of each call of `give`.
    """

    def __init__(self, dataset: Dataset, workers: int = 1, at_once: int = AT_ONCE) -> None:
        self.deadly: Collection[str] = ()
        self.given: list[list[str]] = []
        self.deaths = 0
        self.is_stopped = self.is_closed = False
        self._dataset = dataset
        self.workers = workers
        self._at_once = at_once
        self._names = itertools.count(1)
        self._shards: dict[str, deque[Shard]] = {}
        self._staged = set[str]()
        self._events: list[Event] = []

    share = local_share(2, has_gpu=False)
    machines = 1

    def identify(self, job: Job) -> ModelSpec:
        return self._dataset.spec

    def require_shared(self, out: str, inputs: list[str]) -> None: ...

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        for _ in range(self.workers):
            self._start_worker()

    def _start_worker(self) -> None:
        name = f"worker {next(self._names)}"
        self._shards[name] = deque()
        images = self._at_once * hand_made.IMAGES
        self._events.append(WorkerReady(name, self._at_once, images))

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        self.given.append([shard.id for shard in shards])
        self._shards[worker].extend(shards)

    def events(self, wait_s: float) -> list[Event]:
        found, self._events = self._events, []
        for worker, shards in list(self._shards.items()):
            if shards and shards[0].id in self.deadly:
                found.append(self.lose(worker))
            elif shards:
                found += self.step(worker, shards[0])
        if not found:
            time.sleep(min(wait_s, 0.01))
        return found

    def lose(self, worker: str, is_machine: bool = False) -> WorkerLost:
        """End a worker, and start another one."""
        self.deaths += 1
        del self._shards[worker]
        if not self.is_stopped:
            self._start_worker()
        return WorkerLost(worker, RuntimeError("text above\na process died\n"), is_machine)

    def step(self, worker: str, shard: Shard) -> Sequence[Event]:
        """Stage the shard, or commit it where it is staged."""
        if shard.id not in self._staged:
            self._staged.add(shard.id)
            return self.staged(shard)
        self._staged.discard(shard.id)
        self._shards[worker].popleft()
        return [ShardEnded(shard.id, End(hand_made.IMAGES)), self.commit(shard)]

    def staged(self, shard: Shard) -> Sequence[Event]:
        kind = FragmentWritten
        if list_staged(self._dataset, shard.id).covers():
            kind = FragmentSkipped
        hand_made.stage(self._dataset, shard)
        spans = list_staged(self._dataset, shard.id).ranges()
        bad = {"not_an_image": 1}
        return [
            kind(shard.id, start, stop, reasons=bad if start <= hand_made.BAD < stop else {})
            for start, stop in spans
        ]

    def commit(self, shard: Shard) -> Event:
        commit = commit_shard(self._dataset, shard)
        assert commit is not None
        return ShardCommitted(shard.id, commit)

    def drop(self, worker: str) -> None:
        """Forget the first shard of a worker."""
        self._staged.discard(self._shards[worker].popleft().id)

    def stop(self) -> None:
        self.is_stopped = True
        for worker, shards in self._shards.items():
            while len(shards) > 1:  # the first one is finished
                shards.pop()
            self._events += [WorkerStopped(worker)] if not shards else []

    def is_waiting_for_machine(self) -> bool:
        return False

    def describe(self) -> str:
        return "drawn"

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    hand_made.write_tars(tmp_path / "in", SHARDS)
    return hand_made.make_dataset(tmp_path, commit=0)


def shards_of(dataset: Dataset) -> list[Shard]:
    return list_shards(dataset.job, []).shards


def ids(dataset: Dataset) -> list[str]:
    return [shard.id for shard in shards_of(dataset)]


def complete(
    dataset: Dataset, executor: DrawnExecutor | None = None, state: RunState | None = None
) -> RunState:
    state = state or RunState()
    executor = executor or DrawnExecutor(dataset)
    shards = shards_of(dataset)
    executor.begin(dataset, shards, compiled=False)
    with Leases(dataset.out, state.run_id) as leases:
        complete_shards(dataset, shards, executor, leases, state)
    return state


def keep_tars(folder: Path, count: int) -> None:
    for path in sorted((folder / "in").iterdir())[count:]:
        path.unlink()


@pytest.mark.parametrize("workers", [1, 3, SHARDS + 5])
def test_every_shard_is_given_once_and_committed(dataset: Dataset, workers: int) -> None:
    executor = DrawnExecutor(dataset, workers)
    state = complete(dataset, executor)
    assert set(committed_files(dataset.out)) == set(state.commits) == set(ids(dataset))
    assert sorted(itertools.chain(*executor.given)) == sorted(ids(dataset))
    assert state.progress.shards_done == SHARDS and state.failures == {}
    assert state.progress.computed == state.progress.images == SHARDS * hand_made.IMAGES


@pytest.mark.parametrize("which", [0, 7, SHARDS - 1])
def test_a_deadly_shard_is_found_and_the_rest_completes(dataset: Dataset, which: int) -> None:
    killer = ids(dataset)[which]
    executor = DrawnExecutor(dataset)
    executor.deadly = {killer}
    state = complete(dataset, executor)
    assert set(committed_files(dataset.out)) == set(ids(dataset)) - {killer}
    assert state.failures == {killer: "its processes died: a process died"}
    assert state.progress.set_aside == 1
    assert 3 <= executor.deaths <= 5, "twice among others, three times alone"
    assert executor.given.count([killer]) >= 2


@pytest.mark.parametrize("first", [0, 3, SHARDS - 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_deadly_neighbours_are_so_many_failures(dataset: Dataset, first: int, workers: int) -> None:
    executor = DrawnExecutor(dataset, workers)
    executor.deadly = set(ids(dataset)[first : first + 4])
    state = complete(dataset, executor)
    assert set(state.failures) == executor.deadly
    assert set(committed_files(dataset.out)) == set(ids(dataset)) - executor.deadly
    assert executor.deaths <= 5 * 4


def test_a_worker_has_few_shards_at_once(dataset: Dataset) -> None:
    executor = DrawnExecutor(dataset)
    seen = list[int]()
    state = RunState()
    state.report = lambda _: seen.append(len(state.schedule.in_flight))
    complete(dataset, executor, state)
    assert max(seen) == AT_ONCE


def test_an_executor_that_always_dies_is_an_error_of_no_shard(dataset: Dataset) -> None:
    executor = DrawnExecutor(dataset)
    executor.deadly = set(ids(dataset))
    with pytest.raises(
        ClusterError, match=r"fails again and again, also with .* alone: a process died"
    ):
        complete(dataset, executor)
    sizes = [len(shards) for shards in executor.given]
    # All shards in fours, twice; then each alone, until five of them have failed alone.
    assert sizes == [4] * (2 * SHARDS // 4) + [1] * 5 and executor.deaths == len(sizes)


def test_workers_that_die_before_they_have_a_shard_end_the_run(dataset: Dataset) -> None:
    """As where the model never opens; there is no shard to blame."""

    class DiesIdle(DrawnExecutor):
        def events(self, wait_s: float) -> list[Event]:
            return [self.lose(worker) for worker in list(self._shards)]

        def lose(self, worker: str, is_machine: bool = False) -> WorkerLost:
            lost = super().lose(worker, is_machine)
            self._events.clear()  # it never became ready
            return lost

    executor = DiesIdle(dataset)
    with pytest.raises(ClusterError, match=r"fails again and again: a process died\. Look at"):
        complete(dataset, executor)
    assert executor.deaths == 4


def test_the_error_of_a_worker_that_no_retry_mends_ends_the_run(dataset: Dataset) -> None:
    class HasNoModel(DrawnExecutor):
        def events(self, wait_s: float) -> list[Event]:
            wrapped = RuntimeError("text of Ray")
            wrapped.cause = ModelError("the weights changed\nadvice of Ray")
            return [WorkerLost("worker 1", wrapped)]

    executor = HasNoModel(dataset)
    with pytest.raises(ModelError, match=r"^the weights changed$"):
        complete(dataset, executor)
    assert executor.is_closed  # before the failure is recorded: nothing is staged after that


@pytest.mark.parametrize("few", [1, 4])
def test_where_nothing_ever_moved_no_shard_is_blamed_however_few_there_are(
    dataset: Dataset, tmp_path: Path, few: int
) -> None:
    keep_tars(tmp_path, few)
    executor = DrawnExecutor(dataset)
    executor.deadly = set(ids(dataset))
    with pytest.raises(ClusterError, match=f"also with {ids(dataset)[0]}.* alone: a process died"):
        complete(dataset, executor)
    assert executor.deaths <= 2 + 3 * few


def test_a_shard_that_is_tried_again_is_counted_once(dataset: Dataset) -> None:
    """Its fragments arrived, and then it failed."""

    class FailsFirst(DrawnExecutor):
        failed: set[str] = set()

        def commit(self, shard: Shard) -> Event:
            if shard.id in self.failed:
                return super().commit(shard)
            self.failed.add(shard.id)
            return ShardFailed(shard.id, "a fragment went missing")

    state = complete(dataset, FailsFirst(dataset))
    assert FailsFirst.failed == set(ids(dataset))
    assert (state.progress.images, state.progress.errors) == (SHARDS * hand_made.IMAGES, SHARDS)
    assert state.progress.reasons == {"not_an_image": SHARDS}
    assert state.failures == {} and state.counted == {}
    assert set(state.schedule.policy.attempts.values()) == {1}


def test_the_requests_of_a_run_are_those_for_what_it_wrote(dataset: Dataset) -> None:
    staged_before, by_another, *_ = shards_of(dataset)
    hand_made.stage(dataset, staged_before)
    fragments = len(list_staged(dataset, staged_before.id).ranges())

    class Overlaps(DrawnExecutor):
        def commit(self, shard: Shard) -> Event:
            event = super().commit(shard)
            assert isinstance(event, ShardCommitted)
            is_adopted = shard.id == by_another.id
            commit = dataclasses.replace(event.commit, adopted=is_adopted)
            return ShardCommitted(shard.id, commit)

    usage = complete(dataset, Overlaps(dataset)).usage
    assert usage.shards == SHARDS - 1
    assert usage.fragments == (SHARDS - 1) * fragments


def test_shards_that_are_staged_and_not_committed_are_counted(dataset: Dataset) -> None:
    seen = list[tuple[int, int]]()
    complete(
        dataset, state=RunState(report=lambda p: seen.append((p.shards_staged, p.shards_done)))
    )
    assert seen[:3] == [(0, 0), (1, 0), (0, 1)] and seen[-1] == (0, SHARDS)
    assert all(0 <= begun <= SHARDS - done for begun, done in seen)


def test_a_shard_whose_fragments_go_missing_is_set_aside(dataset: Dataset) -> None:
    class Misses(DrawnExecutor):
        def commit(self, shard: Shard) -> Event:
            return ShardFailed(shard.id, "a fragment went missing")

    executor = Misses(dataset)
    state = complete(dataset, executor)
    assert state.failures == dict.fromkeys(ids(dataset), "a fragment went missing")
    assert Counter(itertools.chain(*executor.given)) == dict.fromkeys(ids(dataset), 3)
    assert state.progress.set_aside == SHARDS and committed_files(dataset.out) == {}


def test_broken_and_changed_shards_are_tried_once(dataset: Dataset) -> None:
    broken, changed, *rest = ids(dataset)

    class Odd(DrawnExecutor):
        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            if shard.id not in (broken, changed):
                return super().step(worker, shard)
            self.drop(worker)
            if shard.id == broken:
                return [ShardBroken(shard.id, "it is not a tar")]
            return [ShardChanged(shard.id)]

    executor = Odd(dataset)
    state = complete(dataset, executor)
    assert state.failures == {broken: "it is not a tar"} and state.changed == {changed}
    assert set(committed_files(dataset.out)) == set(rest)
    assert sorted(itertools.chain(*executor.given)) == sorted(ids(dataset))


def test_a_commit_whose_report_was_lost_is_not_made_again(dataset: Dataset) -> None:
    """The worker dies after the data file was created, and before it says so."""

    class DiesSilent(DrawnExecutor):
        died = False

        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            found = super().step(worker, shard)
            if isinstance(found[-1], ShardCommitted) and not self.died:
                self.died = True
                self._shards[worker].appendleft(shard)
                return [self.lose(worker)]
            return found

    executor = DiesSilent(dataset)
    state = complete(dataset, executor)
    (first, *others) = executor.given[0]
    assert executor.deaths == 1 and set(state.commits) == set(ids(dataset))
    given = Counter(itertools.chain(*executor.given))
    assert given[first] == 1 and [given[other] for other in others] == [2] * len(others)
    assert state.commits[first].adopted and state.progress.shards_done == SHARDS
    assert state.failures == {} and state.schedule.policy.attempts == {}


def test_an_input_that_changes_each_time_is_set_aside_and_a_failure_of_an_older_version_is_forgotten(
    dataset: Dataset,
) -> None:
    current = ids(dataset)
    for shard in shards_of(dataset)[2:]:
        hand_made.stage(dataset, shard)
        assert commit_shard(dataset, shard)
    old = [f"{shard.rpartition('-')[0]}-00000000" for shard in current]
    state = RunState(changed={old[0]}, failures={old[2]: "broken"})
    result = finish_run(dataset, dataset.job, state)
    assert result.set_aside == {
        current[0]: "its input changed each time it was read"
    }  # the second one came after the listing
    assert result.pending == 2


@pytest.mark.parametrize("shards", [1, SHARDS])
@pytest.mark.parametrize("losses", [1, 10])
def test_a_lost_machine_is_the_fault_of_no_shard(
    dataset: Dataset, tmp_path: Path, shards: int, losses: int
) -> None:
    """However often: a single shard is not blamed for it either."""
    keep_tars(tmp_path, shards)

    class LosesMachines(DrawnExecutor):
        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            if self.deaths < losses:
                return [self.lose(worker, is_machine=True)]
            return super().step(worker, shard)

    executor = LosesMachines(dataset)
    state = complete(dataset, executor)
    assert len(committed_files(dataset.out)) == shards and executor.deaths == losses
    assert executor.given[: losses + 1] == [executor.given[0]] * (losses + 1)
    assert state.failures == state.schedule.policy.attempts == {}


class Waits(DrawnExecutor):
    """It has no worker before a machine has room, at the third question or never."""

    questions = 0
    waits = True
    starts_after_s = 1.5

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None: ...

    def is_waiting_for_machine(self) -> bool:
        self.questions += 1
        if self.questions == 3:
            threading.Timer(self.starts_after_s, self._start_worker).start()
        return self.waits and self.questions <= 3


def with_timeout(dataset: Dataset, stall_timeout_s: float) -> Dataset:
    job = dataset.job.model_copy(update={"stall_timeout_s": stall_timeout_s})
    return dataclasses.replace(dataset, job=job)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "PLACEMENT_TIMEOUT_S", 1.5)
    monkeypatch.setattr(driver, "NOTICE_S", 0.5)


def test_waiting_for_a_machine_is_logged_and_is_no_stall(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stall timeout begins when there is room."""
    monkeypatch.setattr(driver, "PLACEMENT_TIMEOUT_S", 60)
    monkeypatch.setattr(driver, "NOTICE_S", 0.0)
    monkeypatch.setattr(driver, "EVENT_WAIT_S", 0.01)
    state = complete(with_timeout(dataset, 2.0), Waits(dataset))
    assert set(state.commits) == set(ids(dataset))
    assert (
        "waiting for cluster resources: a machine with room for the model "
        "(this does not count as a stall)" in caplog.text
    )
    assert "another run" not in caplog.text


@pytest.mark.timeout(60)
def test_a_cluster_without_room_ends_the_run_after_a_while(
    dataset: Dataset, short_waits: None
) -> None:
    class NeverHasRoom(Waits):
        def is_waiting_for_machine(self) -> bool:
            return True

    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"no machine had room for the model in 1\.5 s"):
        complete(with_timeout(dataset, 60), NeverHasRoom(dataset))
    assert time.monotonic() - started < 10


@pytest.mark.timeout(60)
@pytest.mark.parametrize("has_worker", [True, False])
def test_a_stalled_run_ends_and_says_what_waits(
    dataset: Dataset, short_waits: None, has_worker: bool
) -> None:
    class Stalls(DrawnExecutor):
        def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
            if has_worker:
                super().begin(dataset, shards, compiled)

        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            return []

    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"no image moved for 0\.5 s \(drawn\)"):
        complete(with_timeout(dataset, 0.5), Stalls(dataset))
    assert time.monotonic() - started < 10


def test_an_hour_without_room_is_counted_from_the_last_event(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machines go after 1.5 s, and come back before 2 s more have passed."""

    class Late(DrawnExecutor):
        def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
            super().begin(dataset, shards, compiled)
            self._began = time.monotonic()

        def events(self, wait_s: float) -> list[Event]:
            elapsed_s = time.monotonic() - self._began
            if not 1.5 < elapsed_s < 3:
                return super().events(wait_s)[: 1 if elapsed_s < 1.5 else None]
            time.sleep(min(wait_s, 0.1))
            return []

        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            if time.monotonic() - self._began < 1.5:
                time.sleep(0.1)
                return [FragmentSkipped(shard.id, 0, 4)]
            return super().step(worker, shard)

        def is_waiting_for_machine(self) -> bool:
            return time.monotonic() - self._began > 1.5

    monkeypatch.setattr(driver, "PLACEMENT_TIMEOUT_S", 2.0)
    monkeypatch.setattr(driver, "NOTICE_S", 0.5)
    state = complete(with_timeout(dataset, 0.7), Late(dataset))
    assert set(state.commits) == set(ids(dataset))


@pytest.mark.timeout(60)
def test_a_commit_that_is_not_in_out_is_a_failure_after_three(dataset: Dataset) -> None:
    """As of a machine that writes to a disk of its own under the same path."""
    lost = ids(dataset)[3]

    class HasOwnDisk(DrawnExecutor):
        def commit(self, shard: Shard) -> Event:
            found = super().commit(shard)
            if shard.id == lost:
                store_for(dataset.out).delete([dataset.data_url(shard.id)])
            return found

    executor = HasOwnDisk(dataset)
    state = complete(dataset, executor)
    assert set(state.failures) == {lost}
    assert "do all machines see the same disk?" in state.failures[lost]
    assert set(state.commits) == set(committed_files(dataset.out)) == set(ids(dataset)) - {lost}
    assert executor.given[-2:] == [[lost]] * 2
    assert Counter(itertools.chain(*executor.given))[lost] == 3


@pytest.mark.timeout(60)
def test_a_run_that_is_stopped_takes_what_is_in_flight_and_gives_nothing_more(
    dataset: Dataset,
) -> None:
    class Finishes(DrawnExecutor):
        def step(self, worker: str, shard: Shard) -> Sequence[Event]:
            found = super().step(worker, shard)
            is_last = self.is_stopped and not self._shards[worker]
            return [*found, WorkerStopped(worker)] if is_last else found

    executor = Finishes(dataset, workers=2)
    state = RunState()

    def report(progress: object) -> None:
        if state.progress.shards_done >= 5:
            state.stop.set()

    state.report = report
    complete(dataset, executor, state)
    assert executor.is_stopped and state.failures == {}
    assert set(state.commits) == set(committed_files(dataset.out))
    assert 5 <= len(state.commits) <= 5 + 2 * 2


@pytest.mark.timeout(60)
def test_a_worker_that_dies_while_the_run_stops_is_not_waited_for(dataset: Dataset) -> None:
    class Dies(DrawnExecutor):
        def stop(self) -> None:
            self.is_stopped = True
            self.deadly = set(ids(dataset))

    executor = Dies(dataset)
    state = RunState()
    state.report = lambda progress: state.stop.set() if progress.shards_done else None
    complete(dataset, executor, state)
    assert executor.deaths == 1 and state.failures == {}
    assert set(committed_files(dataset.out)) == set(state.commits)


def test_too_many_bad_images_end_the_run(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "RATED_IMAGES", 50)
    job = dataset.job.model_copy(update={"max_error_rate": 0.05})
    with pytest.raises(ErrorRateExceeded, match=r"5 of 50 images are bad \(5 not_an_image\)"):
        complete(dataclasses.replace(dataset, job=job))


class OtherRun:
    """Another live run of the same job, and the shards that it has."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        self.dataset = dataset
        self.leases = Leases(dataset.out, "0-other")
        self.leases.__enter__()
        self.shards = self.leases.claim(ids(dataset), count)
        assert len(self.shards) == count

    def commit(self, count: int) -> None:
        """Commit its first shards, and release them."""
        by_id = {shard.id: shard for shard in shards_of(self.dataset)}
        done, self.shards = self.shards[:count], self.shards[count:]
        for shard in done:
            hand_made.stage(self.dataset, by_id[shard])
            assert commit_shard(self.dataset, by_id[shard])
        self.leases.release(done)
        self.leases.renew()


@pytest.fixture
def other(dataset: Dataset) -> Iterator[OtherRun]:
    found = OtherRun(dataset, 6)
    yield found
    found.leases.close()


def later(work: Callable[[], None], after_s: float = 1.5) -> threading.Thread:
    def run() -> None:
        time.sleep(after_s)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.timeout(60)
def test_shards_of_another_run_are_waited_for_and_not_computed(
    dataset: Dataset, other: OtherRun, short_waits: None
) -> None:
    """Nor is the wait a stall, or one for a machine."""
    executor = DrawnExecutor(dataset)
    theirs = set(other.shards)
    thread = later(lambda: other.commit(6))
    state = complete(with_timeout(dataset, 1.0), executor)
    thread.join()
    assert set(itertools.chain(*executor.given)) == set(ids(dataset)) - theirs
    assert set(committed_files(dataset.out)) == set(ids(dataset))
    assert set(state.commits) == set(ids(dataset)) - theirs
    assert state.progress.shards_done == SHARDS


@pytest.mark.timeout(60)
def test_shards_that_another_run_has_just_committed_are_not_computed(
    dataset: Dataset, other: OtherRun
) -> None:
    """It released them, and goes on; this run had planned them, too."""
    theirs = set(other.shards[:3])
    other.commit(3)
    executor = DrawnExecutor(dataset)
    thread = later(lambda: other.commit(3))
    state = complete(dataset, executor)
    thread.join()
    assert not theirs & set(itertools.chain(*executor.given))
    assert set(committed_files(dataset.out)) == set(ids(dataset))
    assert state.progress.shards_done == SHARDS


@pytest.mark.timeout(60)
def test_a_long_look_at_the_data_files_keeps_no_worker_waiting(
    dataset: Dataset, other: OtherRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are a million of them."""
    took_s = 3.0

    def look_long(out: str) -> object:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(took_s)
        return committed_files(out)

    monkeypatch.setattr(driver, "committed_files", look_long)
    started = time.monotonic()
    own_shards_done_s = list[float]()
    state = RunState()

    def report(progress: object) -> None:
        if len(state.commits) == SHARDS - 6:
            own_shards_done_s.append(time.monotonic() - started)

    state.report = report
    thread = later(lambda: other.commit(6), after_s=took_s)
    complete(dataset, state=state)
    thread.join()
    assert own_shards_done_s[0] < took_s
    assert set(committed_files(dataset.out)) == set(ids(dataset))


@pytest.mark.timeout(60)
def test_shards_of_a_run_that_ends_without_them_are_computed(
    dataset: Dataset, other: OtherRun
) -> None:
    executor = DrawnExecutor(dataset)
    thread = later(other.leases.close)
    state = complete(dataset, executor)
    thread.join()
    assert set(state.commits) == set(ids(dataset))
    assert sorted(itertools.chain(*executor.given)) == sorted(ids(dataset))


def test_leases_of_a_run_that_ended_are_gone(dataset: Dataset) -> None:
    complete(dataset)
    with Leases(dataset.out, "later") as leases:
        assert not leases.has_others
        assert leases.claim(ids(dataset), SHARDS) == ids(dataset)
