"""Which shard goes to which worker, without clocks, threads or storage."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitray.pipeline.retry import ATTEMPTS
from vitray.pipeline.schedule import MOST_SHARDS, Schedule


def names(count: int, first: int = 0) -> list[str]:
    return [f"s{n:04d}" for n in range(first, first + count)]


def schedule_of(shards: int, workers: int = 1, at_once: int = 2, images: int = 100) -> Schedule:
    schedule = Schedule()
    schedule.add(names(shards))
    for n in range(workers):
        schedule.worker_ready(f"w{n}", at_once, images)
    return schedule


def test_nothing_is_given_before_a_worker_is_ready() -> None:
    schedule = schedule_of(4, workers=0)
    assert schedule.next_shards() == {} and schedule.wanted == 0 and not schedule.is_done
    schedule.worker_ready("w0", 2, 100)
    assert schedule.next_shards() == {"w0": ["s0000", "s0001"]}
    assert schedule.next_shards() == {}


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        pytest.param(1000, 2, id="large shards: as many as keep its readers busy"),
        pytest.param(50, 2, id="two of them are all images that it can have"),
        pytest.param(10, 10, id="small shards: as many as fill its stages"),
        pytest.param(7, 14, id="rounded"),
        pytest.param(0, 100, id="empty shards count as one image"),
    ],
)
def test_room_follows_the_mean_size_of_the_shards_that_were_read(
    images: int, expected: int
) -> None:
    schedule = schedule_of(0)
    schedule.shard_read(images)
    schedule.shard_read(images)
    schedule.add(names(400))
    assert len(schedule.next_shards()["w0"]) == expected


def test_room_is_bounded_however_small_shards_are() -> None:
    schedule = schedule_of(4 * MOST_SHARDS, images=100 * MOST_SHARDS)
    schedule.shard_read(1)
    assert len(schedule.next_shards()["w0"]) == MOST_SHARDS


def test_room_grows_when_small_shards_end() -> None:
    schedule = schedule_of(100)
    (first, second) = schedule.next_shards()["w0"]
    schedule.shard_read(10)
    schedule.shard_committed(first)
    assert len(schedule.next_shards()["w0"]) == 9
    assert second in schedule.in_flight and len(schedule.in_flight) == 10


def test_a_full_worker_gets_more_when_shards_turn_out_smaller() -> None:
    """None of its own has ended; those of another worker have."""
    schedule = schedule_of(100, workers=2)
    given = schedule.next_shards()
    assert {worker: len(shards) for worker, shards in given.items()} == {"w0": 2, "w1": 2}
    for shard, images in zip(given["w0"], (40, 10)):
        schedule.shard_read(images)
        schedule.shard_committed(shard)
    assert {worker: len(shards) for worker, shards in schedule.next_shards().items()} == {
        "w0": 4,
        "w1": 2,
    }


def test_wanted_is_the_room_that_no_waiting_shard_fills() -> None:
    schedule = schedule_of(1, workers=3)
    assert schedule.wanted == 5
    schedule.add(names(20, first=1))
    assert schedule.wanted == 0
    schedule.next_shards()
    assert schedule.wanted == 0
    for shard in sorted(schedule.in_flight):
        schedule.shard_committed(shard)
    schedule.next_shards()
    assert len(schedule.in_flight) == 6


def test_last_shards_are_shared_fairly() -> None:
    """A worker with room for ten leaves the other ones their share."""
    schedule = schedule_of(9, workers=3, at_once=10)
    given = schedule.next_shards()
    assert {worker: len(shards) for worker, shards in given.items()} == {"w0": 3, "w1": 2, "w2": 2}
    rest = schedule.next_shards()
    assert {worker: len(shards) for worker, shards in rest.items()} == {"w0": 1, "w1": 1}
    assert schedule.in_flight == set(names(9))


def test_a_shard_that_failed_waits_behind_the_others() -> None:
    schedule = schedule_of(3, at_once=1)
    order = list[str]()
    while not schedule.is_done:
        (shard,) = schedule.next_shards()["w0"]
        order.append(shard)
        if shard == "s0000" and order.count(shard) < ATTEMPTS:
            schedule.shard_failed(shard)
        else:
            schedule.shard_committed(shard)
    assert order == ["s0000", "s0001", "s0002", "s0000", "s0000"]


def test_a_shard_is_set_aside_after_its_last_attempt() -> None:
    schedule = schedule_of(1)
    for _ in range(ATTEMPTS):
        assert schedule.next_shards() == {"w0": ["s0000"]}
        schedule.shard_failed("s0000")
    assert schedule.next_shards() == {} and schedule.is_done and schedule.policy.set_aside == 1


def test_shards_of_a_lost_worker_go_to_the_others() -> None:
    schedule = schedule_of(3, workers=2)
    assert schedule.next_shards() == {"w0": ["s0000", "s0001"], "w1": ["s0002"]}
    assert schedule.worker_lost("w0", is_machine=False) == {}
    assert schedule.shards_of("w0") == [] and schedule.in_flight == {"s0002"}
    schedule.shard_committed("s0002")
    assert schedule.next_shards() == {"w1": ["s0000", "s0001"]}


def test_shards_of_a_lost_machine_come_first_and_are_not_blamed() -> None:
    schedule = schedule_of(20)
    for _ in range(10):
        assert schedule.next_shards() == {"w0": ["s0000", "s0001"]}
        assert schedule.worker_lost("w0", is_machine=True) == {}
        schedule.worker_ready("w0", 2, 100)
    assert schedule.policy.attempts == {} and not schedule.is_fatal


def lose(schedule: Schedule, worker: str) -> list[str]:
    """A worker dies and is replaced. Returns the shards that are to blame."""
    blamed = schedule.worker_lost(worker, is_machine=False)
    schedule.worker_ready(worker, 2, 100)
    return list(blamed)


def test_suspects_run_alone_and_last() -> None:
    """Two workers died that had both; neither is given together with another shard."""
    schedule = schedule_of(2)
    for _ in range(2):
        assert schedule.next_shards() == {"w0": ["s0000", "s0001"]}
        assert lose(schedule, "w0") == []
    schedule.add(names(4, first=2))
    order = list[list[str]]()
    for _ in range(3):
        order.append(schedule.next_shards()["w0"])
        if len(order[-1]) > 1:
            for shard in order[-1]:
                schedule.shard_committed(shard)
    assert order == [["s0002", "s0003"], ["s0004", "s0005"], ["s0000"]]
    assert schedule.next_shards() == {} and schedule.wanted == 0
    assert lose(schedule, "w0") == ["s0000"]
    assert schedule.next_shards() == {"w0": ["s0001"]}
    schedule.shard_committed("s0001")
    assert schedule.next_shards() == {"w0": ["s0000"]}
    schedule.shard_committed("s0000")
    schedule.add(names(2, first=6))
    assert schedule.next_shards() == {"w0": ["s0006", "s0007"]}  # it is not alone any more


def test_suspects_run_beside_each_other_on_several_workers() -> None:
    schedule = schedule_of(2)
    for _ in range(2):
        schedule.next_shards()
        lose(schedule, "w0")
    schedule.worker_ready("w1", 2, 100)
    assert schedule.next_shards() == {"w0": ["s0000"], "w1": ["s0001"]}
    schedule.add(names(5, first=2))
    assert schedule.next_shards() == {}
    assert lose(schedule, "w1") == ["s0001"]
    assert schedule.next_shards() == {"w1": ["s0002", "s0003"]}


def test_suspects_wait_until_no_more_shards_are_added() -> None:
    schedule = schedule_of(2)
    for _ in range(2):
        schedule.next_shards()
        lose(schedule, "w0")
    assert schedule.wanted == 2 and schedule.next_shards(are_last=False) == {}
    schedule.add(names(1, first=2))
    assert schedule.next_shards(are_last=False) == {"w0": ["s0002"]}
    schedule.shard_committed("s0002")
    assert schedule.next_shards(are_last=True) == {"w0": ["s0000"]}


def test_a_shard_that_comes_back_is_next_and_not_blamed() -> None:
    schedule = schedule_of(3)
    assert schedule.next_shards() == {"w0": ["s0000", "s0001"]}
    schedule.shard_returned("s0001")
    assert schedule.next_shards() == {"w0": ["s0001"]}
    assert schedule.policy.attempts == {}


def test_a_worker_that_can_have_more_keeps_its_shards() -> None:
    schedule = schedule_of(5)
    assert schedule.next_shards() == {"w0": ["s0000", "s0001"]}
    schedule.worker_ready("w0", 4, 100)
    assert schedule.next_shards() == {"w0": ["s0002", "s0003"]}
    assert schedule.shards_of("w0") == names(4)


class Simulation:
    """Workers whose shards end, fail and kill as a test draws it; every rule is checked."""

    def __init__(self, shards: int, workers: int) -> None:
        self.schedule = Schedule()
        self.waiting = names(shards)
        self.workers: dict[str, set[str]] = {}
        self.most_workers = workers
        self.added = 0
        self.ended = Counter[str]()
        self._started = 0

    def start_worker(self, at_once: int, images: int) -> None:
        if len(self.workers) < self.most_workers:
            self._started += 1
            self.workers[f"w{self._started}"] = set()
            self.schedule.worker_ready(f"w{self._started}", at_once, images)

    def claim(self) -> None:
        """As the driver does: no more than the workers want."""
        wanted = self.schedule.wanted
        self.added += len(self.waiting[:wanted])
        self.schedule.add(self.waiting[:wanted])
        del self.waiting[:wanted]

    def give(self) -> None:
        before = self.schedule.in_flight
        given = self.schedule.next_shards()
        new = [shard for shards in given.values() for shard in shards]
        assert len(new) == len(set(new)) and not set(new) & before
        assert not set(new) & set(self.ended)
        for worker, shards in given.items():
            self.workers[worker].update(shards)
        self.check()

    def give_all(self) -> None:
        """As the driver does until it has nothing to give: then no worker idles beside a shard."""
        while True:
            before = self.schedule.in_flight
            self.give()
            if self.schedule.in_flight == before:
                break
        if not all(self.workers.values()):
            assert self.added - len(self.ended) == len(self.schedule.in_flight)

    def check(self) -> None:
        for worker, shards in self.workers.items():
            assert set(self.schedule.shards_of(worker)) == shards
        assert self.schedule.in_flight == set().union(*self.workers.values())

    def end(self, worker: str, shard: str, how: str) -> None:
        self.workers[worker].discard(shard)
        if how == "commit":
            self.schedule.shard_read(len(shard))
            self.schedule.shard_committed(shard)
        elif how == "change":
            self.schedule.shard_changed(shard)
        elif how == "break":
            self.schedule.shard_broken(shard)
        else:
            self.schedule.shard_failed(shard)
            if self.schedule.policy.attempts[shard] < ATTEMPTS:
                return self.check()
        self.ended[shard] += 1
        self.check()

    def lose(self, worker: str, is_machine: bool) -> None:
        shards = self.workers.pop(worker)
        blamed = self.schedule.worker_lost(worker, is_machine)
        assert set(blamed) <= (shards if len(shards) == 1 and not is_machine else set())
        for shard in blamed:
            self.ended[shard] += self.schedule.policy.attempts[shard] >= ATTEMPTS
        self.ended = +self.ended
        self.check()


ACTIONS = (
    "start",
    "claim",
    "give",
    "give all",
    "commit",
    "change",
    "break",
    "fail",
    "die",
    "machine",
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_shard_ends_once_whatever_happens(data: st.DataObject) -> None:
    """And no shard is ever with two workers."""
    total = data.draw(st.integers(1, 12))
    found = Simulation(total, data.draw(st.integers(1, 4)))
    for action in data.draw(st.lists(st.sampled_from(ACTIONS), max_size=60)):
        busy = sorted(worker for worker, shards in found.workers.items() if shards)
        if action == "start":
            found.start_worker(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 50)))
        elif action == "claim":
            found.claim()
        elif action == "give":
            found.give()
        elif action == "give all":
            found.give_all()
        elif action in ("die", "machine") and found.workers:
            found.lose(data.draw(st.sampled_from(sorted(found.workers))), action == "machine")
        elif busy and action not in ("die", "machine"):
            worker = data.draw(st.sampled_from(busy))
            shard = data.draw(st.sampled_from(sorted(found.workers[worker])))
            found.end(worker, shard, action)
    for _ in range(10 * total):  # from here on all goes well
        found.start_worker(2, 10)
        found.claim()
        found.give()
        for worker, shards in found.workers.items():
            for shard in sorted(shards):
                found.end(worker, shard, "commit")
    assert found.schedule.is_done and not found.waiting
    assert found.ended == Counter(names(total))
