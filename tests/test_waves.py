"""What a run does when the line itself dies: rounds that grow narrower until one shard is alone. No
model, no Ray, no threads.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import hand_made
import pytest

from vitray.dataset import Commit, Dataset, committed, staged
from vitray.errors import ClusterError, VitrayError
from vitray.pipeline import cluster, rounds, runner
from vitray.pipeline.cluster import require_seen
from vitray.pipeline.progress import MARKS, Progress
from vitray.pipeline.rounds import Work
from vitray.pipeline.runner import _complete, _finished
from vitray.pipeline.stages import commit_step
from vitray.schema import Shard, ShardEvent
from vitray.sources import list_shards
from vitray.storage import store_for

SHARDS = 20


class DrawnExecutor:
    """Stages drawn rows. Dies where a round holds a shard of `deadly`; keeps the first fragment
    back where `forgets` says so.
    """

    deadly: frozenset[str] = frozenset()
    forgets: Iterator[bool] = iter(())
    rounds: list[int] = []

    def __init__(self, dataset: Dataset, shards: list[Shard]) -> None:
        self._dataset, self._shards, self._done = (
            dataset,
            shards,
            list[tuple[str, Commit | VitrayError | None]](),
        )
        self.rounds.append(len(shards))

    def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
        for shard in self._shards:
            if shard.id in self.deadly:
                arrived.put(RuntimeError("a process died"))
                return
            before = staged(self._dataset, shard.id).covers()
            hand_made.stage(self._dataset, shard)
            for start, stop in staged(self._dataset, shard.id).ranges():
                bad = {"not_an_image": 1} if start <= hand_made.BAD < stop else {}
                arrived.put(
                    ShardEvent(
                        "staged" if before else "fragment", shard.id, start, stop, reasons=bad
                    )
                )
            if not next(self.forgets, False):
                arrived.put(ShardEvent("end", shard.id, total=hand_made.IMAGES))
        arrived.put(None)

    def stop(self) -> None: ...

    def is_waiting(self) -> bool:
        return False

    def is_short(self) -> bool:
        return False

    def state(self) -> str:
        return "drawn"

    def close(self) -> None: ...

    def commit(self, shard_id: str) -> None:
        shard = next(shard for shard in self._shards if shard.id == shard_id)
        self._done.append((shard_id, commit_step(self._dataset, shard)))

    def commits(self, wait_s: float) -> list[tuple[str, Commit | VitrayError | None]]:
        done, self._done = self._done, []
        return done


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    hand_made.write_tars(tmp_path / "in", SHARDS)
    DrawnExecutor.deadly, DrawnExecutor.forgets, DrawnExecutor.rounds = frozenset(), iter(()), []
    return hand_made.make_dataset(tmp_path, commit=0)


def complete(dataset: Dataset) -> Work:
    work = Work()
    _complete(dataset, dataset.job, list_shards(dataset.job, []), DrawnExecutor, work)
    return work


def ids(dataset: Dataset) -> list[str]:
    return [shard.id for shard in list_shards(dataset.job, []).shards]


@pytest.mark.parametrize("which", [0, 7, SHARDS - 1])
def test_a_deadly_shard_is_found_and_the_rest_completes(dataset: Dataset, which: int) -> None:
    killer = ids(dataset)[which]
    DrawnExecutor.deadly = frozenset({killer})
    work = complete(dataset)
    assert set(committed(dataset.out)) == set(ids(dataset)) - {killer}
    assert work.failures == {killer: "its processes died: a process died"}
    assert len(DrawnExecutor.rounds) < SHARDS, DrawnExecutor.rounds


@pytest.mark.parametrize("first", [0, 3, SHARDS - 4])
def test_deadly_neighbours_are_so_many_failures(dataset: Dataset, first: int) -> None:
    DrawnExecutor.deadly = frozenset(ids(dataset)[first : first + 4])
    work = complete(dataset)
    assert set(work.failures) == DrawnExecutor.deadly and len(committed(dataset.out)) == SHARDS - 4


def test_a_round_has_no_more_fragments_than_the_driver_holds(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LEAST_IMAGE_BYTES", 1)
    monkeypatch.setattr(runner, "ROUND_FRAGMENTS", 6 * hand_made.IMAGES // dataset.fragment_rows)
    assert not complete(dataset).failures and set(committed(dataset.out)) == set(ids(dataset))
    assert DrawnExecutor.rounds == [6, 6, 6, 2]
    DrawnExecutor.rounds.clear()
    monkeypatch.setattr(runner, "ROUND_FRAGMENTS", 0)  # a shard alone is more than all that it may
    for shard in ids(dataset)[:3]:
        store_for(dataset.out).delete([dataset.data_url(shard)])
    complete(dataset)
    assert DrawnExecutor.rounds == [1, 1, 1]


def test_a_line_that_always_dies_is_an_error_and_no_shard_is_blamed_for_it(
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
    work = complete(dataset)
    assert (work.progress.images, work.progress.errors) == (SHARDS * hand_made.IMAGES, SHARDS)
    assert (
        work.progress.reasons == {"not_an_image": SHARDS}
        and work.failures == {}
        and work.counted == {}
    )


def test_shards_that_are_staged_and_not_committed_are_counted(dataset: Dataset) -> None:
    work, seen = Work(), list[tuple[int, int]]()
    work.report = lambda progress: seen.append((progress.shards_staged, progress.shards_done))
    _complete(dataset, dataset.job, list_shards(dataset.job, []), DrawnExecutor, work)
    assert (
        seen[0] == (1, 0)
        and seen[-1] == (0, SHARDS)
        and all(0 <= begun <= SHARDS - done for begun, done in seen)
    )


def test_a_shard_whose_end_never_arrives_is_set_aside(dataset: Dataset) -> None:
    DrawnExecutor.forgets = iter([True] * SHARDS * 10)
    work = complete(dataset)
    assert (
        set(work.failures.values()) == {"its fragments did not arrive"}
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
    now = ids(dataset)
    for shard in list_shards(dataset.job, []).shards[2:]:
        hand_made.stage(dataset, shard)
        assert commit_step(dataset, shard)
    old = [f"{shard.rpartition('-')[0]}-00000000" for shard in now]
    work = Work(changed={old[0]}, failures={old[2]: "broken"})
    result = _finished(dataset, dataset.job, False, work, 0.0)
    assert result.set_aside == {
        now[0]: "its input changed each time it was read"
    }  # the second one came after the listing
    assert result.pending == 2


@pytest.mark.parametrize("shards", [1, SHARDS])
def test_a_round_whose_machine_is_lost_is_planned_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """The first line stands still with a machine gone; the next one does it. One shard alone is not
    blamed for it either.
    """
    for path in sorted((tmp_path / "in").iterdir())[shards:]:
        path.unlink()
    monkeypatch.setattr(rounds, "LOST_S", 0.5)
    real, stands = DrawnExecutor.start, iter([True])

    def start(line: DrawnExecutor, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
        if not next(stands, False):
            real(line, arrived)

    monkeypatch.setattr(DrawnExecutor, "start", start)
    monkeypatch.setattr(DrawnExecutor, "is_short", lambda line: True)
    work = complete(dataset)
    assert len(committed(dataset.out)) == shards and DrawnExecutor.rounds == [shards] * 2
    assert work.failures == work.attempts == {}


@pytest.mark.parametrize(("place_s", "waits"), [(60, True), (60, False), (1.5, True)])
def test_waiting_for_room_is_said_and_is_no_standing_still(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place_s: float, waits: bool
) -> None:
    class Waits(DrawnExecutor):
        asked = 0

        def __init__(self) -> None: ...

        def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
            self._arrived = arrived

        def is_waiting(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                threading.Timer(1.5, self._arrived.put, [None]).start()
            return waits and self.asked <= 3

    monkeypatch.setattr(rounds, "PLACE_S", place_s)
    monkeypatch.setattr(rounds, "SAID_S", 0.5)
    events = rounds._events(Waits(), 2.0 if waits else 0.5, threading.Event())
    if (place_s, waits) == (60, True):
        assert len(list(events)) >= 4  # the patience began when there was room
        assert (
            "no machine has room for the model yet; waiting for one does not count as standing "
            "still" in caplog.text
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

        def start(self, arrived: queue.Queue[ShardEvent | Exception | None]) -> None:
            self._began = time.monotonic()
            for after, item in ((2.5, ShardEvent("staged", "a", 0, 1)), (5.5, None)):
                threading.Timer(after, arrived.put, [item]).start()

        def is_waiting(self) -> bool:
            return time.monotonic() - self._began > 2.5  # its machines went

    monkeypatch.setattr(rounds, "PLACE_S", 3.5)
    monkeypatch.setattr(rounds, "SAID_S", 0.5)
    assert [r.shard for r in rounds._events(Late(), 60, threading.Event()) if r] == ["a"]


@pytest.mark.timeout(60)
def test_a_commit_that_is_not_in_out_is_a_failure_after_three(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a machine that writes to a disk of its own under the same path."""
    lost, real = ids(dataset)[3], DrawnExecutor.commit

    def commit(line: DrawnExecutor, shard_id: str) -> None:
        real(line, shard_id)
        if shard_id == lost:
            store_for(dataset.out).delete([dataset.data_url(shard_id)])

    monkeypatch.setattr(DrawnExecutor, "commit", commit)
    work = complete(dataset)
    assert (
        set(work.failures) == {lost} and "do all machines see the same disk?" in work.failures[lost]
    )
    assert set(work.commits) == set(committed(dataset.out)) == set(ids(dataset)) - {lost}
    assert DrawnExecutor.rounds == [SHARDS, 1, 1]


@pytest.mark.parametrize("comes", [True, False])
def test_a_disk_that_comes_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(cluster, "SEEN_S", 2.0)
    require_seen(str(tmp_path), "s3://nowhere/x")
    if comes:
        threading.Timer(0.5, (tmp_path / "there").mkdir).start()
        require_seen(str(tmp_path), str(tmp_path / "there"))
    else:
        with pytest.raises(
            ClusterError,
            match=f"{tmp_path}/there cannot be seen from {socket.gethostname()}: .* then run again",
        ):
            require_seen(str(tmp_path), str(tmp_path / "there"))


def test_the_timeline_of_a_long_run_is_as_fine_at_its_start_as_at_its_end() -> None:
    progress = Progress()
    for second in range(1, 20_001):
        progress.started = time.monotonic() - second
        progress.add(ShardEvent("fragment", "s", 0, 4 if second <= 19_980 else 1))
    seconds = [at for at, _ in progress.timeline]
    assert MARKS / 2 <= len(seconds) <= MARKS and seconds[0] < 101 and seconds[-1] > 19_900
    assert {round(later - at) for at, later in pairwise(seconds)} == {64}
    assert [images for _, images in progress.timeline[:3]] == [256, 512, 768]
    assert progress.rate_now() == pytest.approx(1.0, abs=0.01) and len(progress.latest) <= 12
