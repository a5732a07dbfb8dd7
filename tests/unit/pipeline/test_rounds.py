"""Rounds whose executor dies: they become smaller until one shard is alone.

There is no model, no Ray, and no thread.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from factories import hand_made
from vitray.dataset import Commit, Dataset, committed_files, list_staged
from vitray.errors import ClusterError, VitrayError
from vitray.pipeline import cluster, rounds, runner
from vitray.pipeline.cluster import require_visible
from vitray.pipeline.progress import TIMELINE_POINTS, Progress
from vitray.pipeline.rounds import EventQueue, RunState, arriving_events
from vitray.pipeline.runner import complete_shards, finish_run
from vitray.pipeline.stages import commit_or_error
from vitray.schema import EventKind, Shard, ShardEvent
from vitray.sources import list_shards
from vitray.storage import store_for

SHARDS = 20


class DrawnExecutor:
    """Stages generated rows.

    It dies at a shard of `deadly`, and sends no end of a shard where `forgets` gives True.
    """

    deadly: frozenset[str] = frozenset()
    forgets: Iterator[bool] = iter(())
    rounds: list[int] = []

    def __init__(self, dataset: Dataset, shards: list[Shard]) -> None:
        self._dataset = dataset
        self._shards = shards
        self._finished: list[tuple[str, Commit | VitrayError | None]] = []
        self.rounds.append(len(shards))

    def start(self, arrived: EventQueue) -> None:
        for shard in self._shards:
            if shard.id in self.deadly:
                arrived.put(RuntimeError("a process died"))
                return
            was_staged = list_staged(self._dataset, shard.id).covers()
            kind = EventKind.FRAGMENT_SKIPPED if was_staged else EventKind.FRAGMENT_WRITTEN
            hand_made.stage(self._dataset, shard)
            for start, stop in list_staged(self._dataset, shard.id).ranges():
                bad = {"not_an_image": 1} if start <= hand_made.BAD < stop else {}
                arrived.put(ShardEvent(kind, shard.id, start, stop, reasons=bad))
            if not next(self.forgets, False):
                arrived.put(ShardEvent(EventKind.SHARD_END, shard.id, total=hand_made.IMAGES))
        arrived.put(None)

    def stop(self) -> None: ...

    def is_waiting_for_machine(self) -> bool:
        return False

    def has_lost_machine(self) -> bool:
        return False

    def describe(self) -> str:
        return "drawn"

    def close(self) -> None: ...

    def start_commit(self, shard_id: str) -> None:
        shard = next(shard for shard in self._shards if shard.id == shard_id)
        self._finished.append((shard_id, commit_or_error(self._dataset, shard)))

    def finished_commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        finished = self._finished
        self._finished = []
        return finished


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    hand_made.write_tars(tmp_path / "in", SHARDS)
    DrawnExecutor.deadly = frozenset()
    DrawnExecutor.forgets = iter(())
    DrawnExecutor.rounds = []
    return hand_made.make_dataset(tmp_path, commit=0)


def complete(dataset: Dataset, state: RunState | None = None) -> RunState:
    state = state or RunState()
    complete_shards(dataset, dataset.job, list_shards(dataset.job, []), DrawnExecutor, state)
    return state


def ids(dataset: Dataset) -> list[str]:
    return [shard.id for shard in list_shards(dataset.job, []).shards]


@pytest.mark.parametrize("which", [0, 7, SHARDS - 1])
def test_a_deadly_shard_is_found_and_the_rest_completes(dataset: Dataset, which: int) -> None:
    killer = ids(dataset)[which]
    DrawnExecutor.deadly = frozenset({killer})
    state = complete(dataset)
    assert set(committed_files(dataset.out)) == set(ids(dataset)) - {killer}
    assert state.failures == {killer: "its processes died: a process died"}
    assert len(DrawnExecutor.rounds) < SHARDS, DrawnExecutor.rounds


@pytest.mark.parametrize("first", [0, 3, SHARDS - 4])
def test_deadly_neighbours_are_so_many_failures(dataset: Dataset, first: int) -> None:
    DrawnExecutor.deadly = frozenset(ids(dataset)[first : first + 4])
    state = complete(dataset)
    assert (
        set(state.failures) == DrawnExecutor.deadly
        and len(committed_files(dataset.out)) == SHARDS - 4
    )


def test_a_round_has_no_more_fragments_than_the_driver_holds(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST_IMAGE_BYTES", 1)
    monkeypatch.setattr(runner, "ROUND_FRAGMENTS", 6 * hand_made.IMAGES // dataset.fragment_rows)
    assert not complete(dataset).failures and set(committed_files(dataset.out)) == set(ids(dataset))
    assert DrawnExecutor.rounds == [6, 6, 6, 2]
    DrawnExecutor.rounds.clear()
    monkeypatch.setattr(runner, "ROUND_FRAGMENTS", 0)  # a shard alone is more than all that it may
    for shard in ids(dataset)[:3]:
        store_for(dataset.out).delete([dataset.data_url(shard)])
    complete(dataset)
    assert DrawnExecutor.rounds == [1, 1, 1]


def test_an_executor_that_always_dies_is_an_error_of_no_shard(
    dataset: Dataset,
) -> None:
    DrawnExecutor.deadly = frozenset(ids(dataset))
    with pytest.raises(
        ClusterError, match=r"fails again and again, also with .* alone: a process died"
    ):
        complete(dataset)
    assert DrawnExecutor.rounds == [20, 20, 2] + [1] * 5


def test_a_shard_that_is_planned_again_is_counted_once(dataset: Dataset) -> None:
    DrawnExecutor.forgets = iter([True] * SHARDS)  # in the first round no end arrives
    state = complete(dataset)
    assert (state.progress.images, state.progress.errors) == (SHARDS * hand_made.IMAGES, SHARDS)
    assert (
        state.progress.reasons == {"not_an_image": SHARDS}
        and state.failures == {}
        and state.counted == {}
    )


def test_shards_that_are_staged_and_not_committed_are_counted(dataset: Dataset) -> None:
    seen = list[tuple[int, int]]()
    complete(dataset, RunState(report=lambda p: seen.append((p.shards_staged, p.shards_done))))
    assert (
        seen[0] == (1, 0)
        and seen[-1] == (0, SHARDS)
        and all(0 <= begun <= SHARDS - done for begun, done in seen)
    )


def test_a_shard_whose_end_never_arrives_is_set_aside(dataset: Dataset) -> None:
    DrawnExecutor.forgets = iter([True] * SHARDS * 10)
    state = complete(dataset)
    assert (
        set(state.failures.values()) == {"its fragments did not arrive"}
        and len(DrawnExecutor.rounds) == 3
    )


@pytest.mark.parametrize("few", [1, 4])
def test_where_nothing_ever_moved_no_shard_is_blamed_however_few_there_are(
    dataset: Dataset, tmp_path: Path, few: int
) -> None:
    for path in sorted((tmp_path / "in").iterdir())[few:]:
        path.unlink()
    DrawnExecutor.deadly = frozenset(ids(dataset))
    with pytest.raises(ClusterError, match=f"also with {ids(dataset)[0]}.* alone: a process died"):
        complete(dataset)
    assert len(DrawnExecutor.rounds) <= 2 + 3 * few


def test_an_input_that_changes_each_time_is_set_aside_and_a_failure_of_an_older_version_is_forgotten(
    dataset: Dataset,
) -> None:
    current = ids(dataset)
    for shard in list_shards(dataset.job, []).shards[2:]:
        hand_made.stage(dataset, shard)
        assert commit_or_error(dataset, shard)
    old = [f"{shard.rpartition('-')[0]}-00000000" for shard in current]
    state = RunState(changed={old[0]}, failures={old[2]: "broken"})
    result = finish_run(dataset, dataset.job, state)
    assert result.set_aside == {
        current[0]: "its input changed each time it was read"
    }  # the second one came after the listing
    assert result.pending == 2


@pytest.mark.parametrize("shards", [1, SHARDS])
def test_a_round_whose_machine_is_lost_is_planned_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """The first executor stalls with a machine gone, the second one completes the shards.

    A single shard is not blamed for it either.
    """
    for path in sorted((tmp_path / "in").iterdir())[shards:]:
        path.unlink()
    monkeypatch.setattr(rounds, "LOST_MACHINE_S", 0.5)
    real = DrawnExecutor.start
    stalls = iter([True])

    def start(executor: DrawnExecutor, arrived: EventQueue) -> None:
        if not next(stalls, False):
            real(executor, arrived)

    monkeypatch.setattr(DrawnExecutor, "start", start)
    monkeypatch.setattr(DrawnExecutor, "has_lost_machine", lambda executor: True)
    state = complete(dataset)
    assert len(committed_files(dataset.out)) == shards and DrawnExecutor.rounds == [shards] * 2
    assert state.failures == state.attempts == {}


@pytest.mark.parametrize(("timeout_s", "waits"), [(60, True), (60, False), (1.5, True)])
def test_waiting_for_a_machine_is_logged_and_is_no_stall(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, timeout_s: float, waits: bool
) -> None:
    class Waits(DrawnExecutor):
        questions = 0

        def __init__(self) -> None: ...

        def start(self, arrived: EventQueue) -> None:
            self._arrived = arrived

        def is_waiting_for_machine(self) -> bool:
            self.questions += 1
            if self.questions == 3:
                threading.Timer(1.5, self._arrived.put, [None]).start()
            return waits and self.questions <= 3

    monkeypatch.setattr(rounds, "PLACEMENT_TIMEOUT_S", timeout_s)
    monkeypatch.setattr(rounds, "NOTICE_S", 0.5)
    events = arriving_events(Waits(), 2.0 if waits else 0.5, threading.Event())
    if (timeout_s, waits) == (60, True):
        assert len(list(events)) >= 4  # the stall timeout began when there was room
        assert (
            "waiting for cluster resources: a machine with room for the model "
            "(this does not count as a stall)" in caplog.text
        )
        return
    why = (
        r"no machine had room for the model in 1\.5 s"
        if waits
        else r"no image moved for 0\.5 s \(drawn\)"
    )
    with pytest.raises(ClusterError, match=why):
        list(events)


def test_an_hour_without_room_is_counted_from_the_last_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(DrawnExecutor):
        def __init__(self) -> None: ...

        def start(self, arrived: EventQueue) -> None:
            self._began = time.monotonic()
            event = ShardEvent(EventKind.FRAGMENT_SKIPPED, "a", 0, 1)
            for delay_s, item in ((2.5, event), (5.5, None)):
                threading.Timer(delay_s, arrived.put, [item]).start()

        def is_waiting_for_machine(self) -> bool:
            return time.monotonic() - self._began > 2.5  # its machines went

    monkeypatch.setattr(rounds, "PLACEMENT_TIMEOUT_S", 3.5)
    monkeypatch.setattr(rounds, "NOTICE_S", 0.5)
    assert [r.shard for r in arriving_events(Late(), 60, threading.Event()) if r] == ["a"]


@pytest.mark.timeout(60)
def test_a_commit_that_is_not_in_out_is_a_failure_after_three(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a machine that writes to a disk of its own under the same path."""
    lost = ids(dataset)[3]
    real = DrawnExecutor.start_commit

    def commit(executor: DrawnExecutor, shard_id: str) -> None:
        real(executor, shard_id)
        if shard_id == lost:
            store_for(dataset.out).delete([dataset.data_url(shard_id)])

    monkeypatch.setattr(DrawnExecutor, "start_commit", commit)
    state = complete(dataset)
    assert (
        set(state.failures) == {lost}
        and "do all machines see the same disk?" in state.failures[lost]
    )
    assert set(state.commits) == set(committed_files(dataset.out)) == set(ids(dataset)) - {lost}
    assert DrawnExecutor.rounds == [SHARDS, 1, 1]


@pytest.mark.parametrize("comes", [True, False])
def test_a_disk_that_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(cluster, "DISK_TIMEOUT_S", 2.0)
    require_visible(str(tmp_path), "s3://nowhere/x")
    if comes:
        threading.Timer(0.5, (tmp_path / "disk").mkdir).start()
        require_visible(str(tmp_path), str(tmp_path / "disk"))
    else:
        with pytest.raises(
            ClusterError,
            match=f"{tmp_path}/disk cannot be seen from {socket.gethostname()}: .* then run again",
        ):
            require_visible(str(tmp_path), str(tmp_path / "disk"))


def test_the_timeline_of_a_long_run_is_as_fine_at_its_start_as_at_its_end() -> None:
    progress = Progress()
    for second in range(1, 20_001):
        progress.started = time.monotonic() - second
        progress.add(ShardEvent(EventKind.FRAGMENT_WRITTEN, "s", 0, 4 if second <= 19_980 else 1))
    seconds = [at for at, _ in progress.timeline]
    assert (
        TIMELINE_POINTS / 2 <= len(seconds) <= TIMELINE_POINTS
        and seconds[0] < 101
        and seconds[-1] > 19_900
    )
    assert {round(later - at) for at, later in pairwise(seconds)} == {64}
    assert [images for _, images in progress.timeline[:3]] == [256, 512, 768]
    assert progress.recent_rate() == pytest.approx(1.0, abs=0.01) and len(progress.recent) <= 12
