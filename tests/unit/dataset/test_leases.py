"""Leases: overlapping runs share the shards, and a dead run keeps none."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.explorer import Bounds, Died, MemoryStore, Run, Scenario, Violation, explore
from vitray.dataset import Leases, leases
from vitray.dataset.leases import (
    EXPIRE_S,
    LOOK_S,
    MAX_PID,
    MAX_READS,
    Conflicts,
    Holder,
    Lease,
    Observation,
    choose_reads,
    conflicts,
    drop_abandoned_leases,
    expires_unless_read,
    free,
    has_ended,
    is_due,
    is_live,
    lease_bytes,
    observe,
    parse_lease,
    this_process,
)
from vitray.errors import StorageError
from vitray.storage import ObjectInfo, join, store_for, stores

OWN = this_process()
NOBODY = Holder("another boot", 1, 1, 1)
SEEN = Observation("v1", b"1", Lease(frozenset("ab")), changed_at=100.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(local_out: str) -> Path:
    return Path(local_out) / "_vitray" / "leases"


@pytest.fixture
def run(local_out: str, clock: Clock) -> Callable[[str], Leases]:
    """A run of the dataset, whose lease is renewed by hand only."""

    def begin(name: str) -> Leases:
        return Leases(local_out, name, clock=clock, sleep=clock.pass_s)

    return begin


def put(folder: Path, run: str, lease: Lease, counter: int = 1) -> None:
    store_for(str(folder)).replace(str(folder / f"{run}.json"), lease_bytes(lease, counter))


@pytest.mark.parametrize(
    ("age_s", "ended", "expected"),
    [
        (0, False, True),
        (EXPIRE_S - 0.1, False, True),
        (EXPIRE_S, False, False),
        (0, True, False),
    ],
)
def test_a_lease_counts_until_it_did_not_change_for_long(
    age_s: float, ended: bool, expected: bool
) -> None:
    assert is_live(SEEN, SEEN.changed_at + age_s, ended) is expected


@pytest.mark.parametrize(
    ("seen", "version", "now", "expected"),
    [
        (None, "v1", 100, True),
        (SEEN, "v1", 101, False),
        (SEEN, "v2", 101, True),
        (SEEN, "v1", 100 + EXPIRE_S, True),
    ],
    ids=["new", "unchanged", "changed", "about to expire"],
)
def test_a_lease_is_read_only_when_it_may_have_changed(
    seen: Observation | None, version: str, now: float, expected: bool
) -> None:
    assert is_due(seen, version, now) is expected


@pytest.mark.parametrize(
    ("seen", "version", "now", "expected"),
    [
        (None, "v1", 100 + EXPIRE_S, False),
        (SEEN, "v1", 99 + EXPIRE_S, False),
        (SEEN, "v1", 100 + EXPIRE_S, True),
        (SEEN, "v2", 100 + EXPIRE_S, False),
    ],
    ids=["new", "young", "old", "changed"],
)
def test_a_lease_expires_where_not_even_its_version_changed(
    seen: Observation | None, version: str, now: float, expected: bool
) -> None:
    assert expires_unless_read(seen, version, now) is expected


def test_leases_that_may_expire_are_read_first() -> None:
    due = {"a": False, "b": True, "c": False, "d": True}
    assert choose_reads(due, 1) == ["b"]
    assert choose_reads(due, 2) == ["b", "d"]
    assert set(choose_reads(due, 3)) in ({"a", "b", "d"}, {"b", "c", "d"})
    assert set(choose_reads(due, 9)) == set("abcd")
    assert {choose_reads({"a": False, "c": False}, 1)[0] for _ in range(100)} == {"a", "c"}


@pytest.mark.parametrize(
    ("before", "version", "data", "expected"),
    [
        (None, "v1", None, None),
        (None, "v1", b"1", Observation("v1", b"1", Lease(), 105.0)),
        (SEEN, "v1", None, SEEN),
        (SEEN, "v1", b"1", SEEN),
        (SEEN, "v2", b"1", replace(SEEN, version="v2")),
        (SEEN, "v2", b"2", Observation("v2", b"2", Lease(), 105.0)),
        (SEEN, "v1", b"2", Observation("v1", b"2", Lease(), 105.0)),
        (SEEN, "v2", None, replace(SEEN, changed_at=105.0)),
    ],
    ids=[
        "new, not read",
        "new",
        "unchanged",
        "read again, unchanged",
        "written again with the same content",
        "changed",
        "changed behind an old listing",
        "changed, not read",
    ],
)
def test_an_observation_is_as_old_as_the_content(
    before: Observation | None, version: str, data: bytes | None, expected: Observation | None
) -> None:
    assert observe(before, version, data, 105.0) == expected


@pytest.mark.parametrize(
    ("own", "others", "most", "expected"),
    [
        ("", "", 2, "ab"),
        ("", "", 9, "abcd"),
        ("a", "c", 2, "bd"),
        ("abcd", "", 2, ""),
        ("", "x", 0, ""),
    ],
)
def test_free_ids_keep_their_order(own: str, others: str, most: int, expected: str) -> None:
    assert free("abcd", set(own), set(others), most) == list(expected)


@pytest.mark.parametrize(
    ("others", "lost", "contested"),
    [
        ({}, "", ""),
        ({"a": "xy"}, "", ""),
        ({"a": "1"}, "1", ""),
        ({"z": "1"}, "", "1"),
        ({"a": "12", "z": "23"}, "12", "3"),
    ],
)
def test_the_smaller_run_has_the_first_right(
    others: dict[str, str], lost: str, contested: str
) -> None:
    named = {run: Lease(frozenset(shards)) for run, shards in others.items()}
    assert conflicts("m", "123", named) == Conflicts(frozenset(lost), frozenset(contested))


def test_a_lease_is_stored_and_read() -> None:
    lease = Lease(frozenset(("a", "b")), OWN)
    assert OWN is not None and parse_lease(lease_bytes(lease, 7)) == lease
    assert lease_bytes(lease, 7) != lease_bytes(lease, 8)
    assert parse_lease(lease_bytes(Lease(), 1)) == Lease()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"shards": [1], "holder": null}',
        b'{"shards": 3, "holder": null}',
        b'{"shards": "abc", "holder": null}',
        b'{"shards": ["a"], "holder": 3}',
        b'{"shards": ["a"], "holder": {}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_lease_names_nothing(data: bytes) -> None:
    assert parse_lease(data) == Lease()


@pytest.mark.parametrize("pid", [0, -1, MAX_PID + 1, 1 << 80, "1", None, True])
def test_no_signal_is_sent_to_a_number_that_is_no_process(pid: object) -> None:
    holder = {"boot_id": "b", "pid_namespace": 1, "pid": pid, "started": 1}
    document = {"shards": ["a"], "holder": holder}
    assert parse_lease(json.dumps(document).encode()) == Lease(frozenset("a"))


def test_only_a_process_of_this_machine_is_known_to_have_ended() -> None:
    assert OWN is not None
    assert not has_ended(OWN, OWN)
    assert has_ended(replace(OWN, started=OWN.started - 1), OWN), "another process had the id"
    assert has_ended(replace(OWN, pid=MAX_PID), OWN)
    assert not has_ended(replace(OWN, pid=MAX_PID, boot_id="b"), OWN)
    assert not has_ended(replace(OWN, pid=MAX_PID, pid_namespace=1), OWN)
    assert not has_ended(None, OWN) and not has_ended(OWN, None)


def test_two_runs_share_the_shards(run: Callable[[str], Leases], clock: Clock) -> None:
    first, second = run("a"), run("b")
    assert first.claim("12345", 2) == ["1", "2"]
    assert second.claim("12345", 2) == ["3", "4"]
    assert first.claim("12345", 2) == ["5"]
    assert second.claim("12345", 2) == []
    assert second.held_by_others() == {"1", "2", "5"} and second.has_others
    first.release(["1", "2"])
    assert second.claim("12345", 1) == [], "the next claim or renewal writes it"
    first.renew()
    clock.pass_s(LOOK_S)
    assert second.claim("12345", 1) == ["1"]


def test_a_run_that_ends_leaves_nothing(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    with run("a") as first:
        assert first.claim("12", 1) == ["1"]
        second = run("b")
        assert second.claim("12", 2) == ["2"]
    clock.pass_s(LOOK_S)
    assert second.claim("12", 2) == ["1"]
    second.close()
    second.renew()
    assert not folder.exists()


def test_a_lease_that_does_not_change_expires_by_the_clock_of_the_reader(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    put(folder, "dead", Lease(frozenset("1"), NOBODY))
    own = run("z")
    assert own.claim("12", 2) == ["2"]
    clock.pass_s(EXPIRE_S - 1)
    assert own.claim("1", 1) == [] and own.has_others
    clock.pass_s(1)
    assert own.claim("1", 1) == ["1"]
    assert not own.has_others and not (folder / "dead.json").exists()


def test_a_lease_that_is_renewed_does_not_expire(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    own = run("z")
    for counter in range(10):
        put(folder, "alive", Lease(frozenset("1"), NOBODY), counter)
        assert own.claim("1", 1) == []
        clock.pass_s(EXPIRE_S - 1)


def test_a_run_that_does_not_look_for_long_finds_a_renewed_lease_alive(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    own = run("z")
    put(folder, "alive", Lease(frozenset("1"), NOBODY), 1)
    assert own.claim("1", 1) == []
    clock.pass_s(100 * EXPIRE_S)
    put(folder, "alive", Lease(frozenset("1"), NOBODY), 2)
    assert own.claim("1", 1) == []


def test_the_lease_of_a_killed_process_of_this_machine_does_not_hold_up_the_next_run(
    run: Callable[[str], Leases], folder: Path
) -> None:
    assert OWN is not None
    put(folder, "dead", Lease(frozenset("12"), replace(OWN, pid=MAX_PID)))
    put(folder, "gone", Lease(frozenset("34"), replace(OWN, started=1)))
    assert run("z").claim("1234", 4) == ["1", "2", "3", "4"]
    assert [path.name for path in folder.iterdir()] == ["z.json"]


def test_a_run_with_nothing_to_claim_deletes_the_lease_of_a_killed_one(
    local_out: str, folder: Path
) -> None:
    assert OWN is not None
    put(folder, "dead", Lease(frozenset("12"), replace(OWN, pid=MAX_PID)))
    with Leases(local_out, "z"):
        pass
    assert not folder.exists()


def test_a_run_whose_lease_was_deleted_writes_it_again(
    run: Callable[[str], Leases], folder: Path
) -> None:
    first, second = run("a"), run("b")
    assert first.claim("12", 1) == ["1"]
    (folder / "a.json").unlink()
    first.renew()
    assert second.claim("12", 2) == ["2"]


def test_damaged_and_foreign_objects_are_no_obstacle(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    folder.mkdir(parents=True)
    (folder / "damaged.json").write_bytes(b'{"shards": ["1"')
    (folder / "README").write_bytes(b"of a person")
    own = run("z")
    assert own.claim("12", 2) == ["1", "2"]
    clock.pass_s(EXPIRE_S)
    own.held_by_others()
    assert sorted(path.name for path in folder.iterdir()) == ["README", "z.json"]


def test_a_look_is_used_again_for_a_second(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    own = run("z")
    assert own.held_by_others() == frozenset()
    put(folder, "other", Lease(frozenset("1"), NOBODY))
    clock.pass_s(LOOK_S / 2)
    assert own.held_by_others() == frozenset()
    clock.pass_s(LOOK_S / 2)
    assert own.held_by_others() == {"1"}


def test_a_lease_is_read_once_for_each_change(
    run: Callable[[str], Leases], clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[str]()
    real = leases.read

    def counted(url: str) -> bytes:
        reads.append(url.rpartition("/")[2])
        return real(url)

    monkeypatch.setattr(leases, "read", counted)
    put(folder, "other", Lease(frozenset("1"), NOBODY))
    own = run("z")
    own.claim("12345", 1)
    own.claim("12345", 1)
    assert reads == ["other.json"]
    put(folder, "other", Lease(frozenset("1"), NOBODY), 2)
    own.claim("12345", 1)
    assert reads == ["other.json"] * 2


def test_beside_a_thousand_runs_a_look_reads_some_of_the_leases(
    run: Callable[[str], Leases], clock: Clock, folder: Path
) -> None:
    count = 3 * MAX_READS
    for number in range(count):
        put(folder, f"{number:04d}", Lease(frozenset([str(number)]), NOBODY))
    own = run("z")
    seen = [len(own.held_by_others())]
    for _ in range(3):
        clock.pass_s(LOOK_S)
        seen.append(len(own.held_by_others()))
    assert seen == [MAX_READS, 2 * MAX_READS, count, count]


def hide_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listings show no change, as those of NFS may for a while."""
    real = leases.under

    def unchanged(url: str) -> list[ObjectInfo]:
        return [replace(info, version="v1") for info in real(url)]

    monkeypatch.setattr(leases, "under", unchanged)


def test_a_lease_that_was_not_read_in_time_is_neither_free_nor_deleted(
    run: Callable[[str], Leases], clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_versions(monkeypatch)
    count = 2 * MAX_READS
    for number in range(count):
        put(folder, f"{number:04d}", Lease(frozenset([str(number)]), NOBODY))
    own = run("z")
    own.held_by_others()
    clock.pass_s(LOOK_S)
    assert len(own.held_by_others()) == count
    for number in range(count):
        put(folder, f"{number:04d}", Lease(frozenset([str(number)]), NOBODY), 2)
    clock.pass_s(EXPIRE_S)
    for _ in range(3):
        assert len(own.held_by_others()) == count
        clock.pass_s(LOOK_S)
    assert len(list(folder.iterdir())) == count


def test_a_lease_that_cannot_be_read_again_is_not_deleted(
    run: Callable[[str], Leases], clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "other", Lease(frozenset("1"), NOBODY))
    own = run("z")
    assert own.claim("1", 1) == []
    clock.pass_s(EXPIRE_S)
    with monkeypatch.context() as patched:
        patched.setattr(leases, "read", broken)
        assert not own.has_others
    assert (folder / "other.json").exists()
    clock.pass_s(LOOK_S)
    assert own.has_others


class SlowStore:
    """Replaces an object only when it may."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.begun = threading.Event()
        self.may_replace = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def replace(self, url: str, data: bytes) -> None:
        self.begun.set()
        assert self.may_replace.wait(10)
        self._real.replace(url, data)


def test_a_renewal_that_waits_for_the_store_leaves_no_lease_after_the_end(
    run: Callable[[str], Leases], local_out: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowStore(store_for(local_out))
    own = run("a")
    own.renew()
    monkeypatch.setattr(leases, "store_for", lambda url: slow)
    renewal = threading.Thread(target=own.renew, daemon=True)
    renewal.start()
    assert slow.begun.wait(10)
    threading.Timer(0.3, slow.may_replace.set).start()
    own.close()
    renewal.join(10)
    assert not folder.exists()


def test_the_end_does_not_wait_for_a_store_that_never_answers(
    run: Callable[[str], Leases], local_out: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowStore(store_for(local_out))
    monkeypatch.setattr(leases, "store_for", lambda url: slow)
    monkeypatch.setattr(leases, "RENEW_S", 0.1)
    own = run("a")
    renewal = threading.Thread(target=own.renew, daemon=True)
    renewal.start()
    assert slow.begun.wait(10)
    started = time.monotonic()
    own.close()
    assert time.monotonic() - started < 5
    slow.may_replace.set()
    renewal.join(10)


def broken(*_: object, **__: object) -> Any:
    raise StorageError("the store is away")


class BrokenStore:
    find = replace = delete = delete_folder = broken


def test_a_store_that_fails_is_logged_once_and_costs_no_shard(
    run: Callable[[str], Leases], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "store_for", lambda url: BrokenStore())
    monkeypatch.setattr(leases, "under", broken)
    with caplog.at_level(logging.WARNING, logger="vitray"), run("a") as own:
        assert own.claim("123", 2) == ["1", "2"]
        own.renew()
        assert own.held_by_others() == frozenset() and not own.has_others
    assert [record.message for record in caplog.records] == [
        "leases do not work, so runs at the same time may repeat work: the store is away"
    ]


def test_a_lease_that_cannot_be_read_is_as_no_lease(
    run: Callable[[str], Leases], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "other", Lease(frozenset("1"), NOBODY))
    monkeypatch.setattr(leases, "read", broken)
    assert run("z").claim("12", 2) == ["1", "2"]


def test_a_thread_renews_the_lease(local_out: str, folder: Path) -> None:
    def counter() -> int:
        return int(json.loads((folder / "a.json").read_bytes())["counter"])

    with Leases(local_out, "a", renew_s=0.01):
        deadline = time.monotonic() + 10
        while counter() < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counter() >= 3
    assert not any(thread.name == "vitray-lease" for thread in threading.enumerate())


def test_leases_of_killed_runs_are_cleaned_after_an_hour(local_out: str, folder: Path) -> None:
    put(folder, "old", Lease())
    put(folder, "new", Lease())
    hours_ago = time.time() - 7200
    os.utime(folder / "old.json", (hours_ago, hours_ago))
    assert drop_abandoned_leases(local_out) == [str(folder / "old.json")]
    assert drop_abandoned_leases(local_out) == []
    assert drop_abandoned_leases(join(local_out, "elsewhere")) == []


def test_runs_at_once_on_a_disk_compute_every_shard_once(local_out: str) -> None:
    shards = [f"{number:03d}" for number in range(60)]
    computed, committed = list[str](), set[str]()
    gate = threading.Barrier(3)

    def complete(name: str) -> None:
        with Leases(local_out, name, sleep=lambda seconds: time.sleep(seconds / 20)) as own:
            gate.wait()
            while pending := [shard for shard in shards if shard not in committed]:
                claimed = own.claim(pending, 4)
                for shard in claimed:
                    if shard not in committed:  # another run had it and has released it since
                        computed.append(shard)
                        committed.add(shard)
                own.release(claimed)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(complete, "abc"))
    assert sorted(computed) == shards


OUT = "s3://b/out"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[MemoryStore]]:
    current = [MemoryStore()]
    monkeypatch.setattr(stores, "s3_store", lambda *_: current[0])
    yield current


def claims(
    store: MemoryStore, held: dict[str, set[str]], run: str, shards: str, rounds: int
) -> Callable[[], list[str]]:
    """A run that claims, works and releases; two runs that hold one shard break the store."""

    def work() -> list[str]:
        own = Leases(OUT, run, clock=lambda: 0.0, sleep=lambda seconds: None)
        worked = list[str]()
        for _ in range(rounds):
            claimed = own.claim(shards, 2)
            for other, others_shards in held.items():
                if other != run and others_shards & set(claimed):
                    store.broken = f"{run} and {other} hold {others_shards & set(claimed)}"
            held[run] = set(claimed)
            own.renew()  # a call of the store, before which other runs may go on
            worked += claimed
            held[run] = set()
            own.release(claimed)
        own.close()
        return worked

    return work


def overlapping(
    memory: list[MemoryStore], names: str, shards: str, rounds: int
) -> Callable[[], tuple[MemoryStore, list[Callable[[], Any]]]]:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        memory[0] = MemoryStore()
        held = dict[str, set[str]]()
        return memory[0], [claims(memory[0], held, name, shards, rounds) for name in names]

    return begin


@pytest.mark.parametrize(
    ("names", "shards", "rounds"),
    [("ab", "1", 1), ("ab", "123", 2), ("abc", "123", 1)],
    ids=["one shard", "two claims", "three runs"],
)
def test_no_order_of_claims_gives_a_shard_to_two_runs(
    memory: list[MemoryStore], names: str, shards: str, rounds: int
) -> None:
    def check(store: MemoryStore, runs: list[Run]) -> None:
        if any(run.error is not None for run in runs):
            raise Violation(f"a run failed: {[run.error for run in runs]}")
        if store.objects:
            raise Violation(f"leases are left: {list(store.objects)}")

    begin = overlapping(memory, names, shards, rounds)
    found = explore(Scenario(begin, check), Bounds(preemptions=4, faults=0, states=1500))
    print(f"{found}")
    assert found.ends >= 3


@pytest.mark.parametrize("mistake", ["the smaller run keeps it", "nobody looks after writing"])
def test_a_mistake_in_the_protocol_is_found(
    memory: list[MemoryStore], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    def without_contested(*arguments: Any) -> Conflicts:
        return conflicts(*arguments)._replace(contested=frozenset())

    def without_any(*_: Any) -> Conflicts:
        return Conflicts(frozenset(), frozenset())

    wrong = without_contested if mistake == "the smaller run keeps it" else without_any
    monkeypatch.setattr(leases, "conflicts", wrong)
    begin = overlapping(memory, "ab", "1", 1)
    with pytest.raises(Violation, match="hold"):
        explore(Scenario(begin, lambda *_: None), Bounds(preemptions=4, faults=0, states=1500))


def test_a_run_that_dies_while_it_claims_stops_nobody(memory: list[MemoryStore]) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        memory[0] = MemoryStore()
        return memory[0], [claims(memory[0], {}, name, "12", 1) for name in "ab"]

    def check(store: MemoryStore, runs: list[Run]) -> None:
        if any(not isinstance(run.error, (Died, type(None))) for run in runs):
            raise Violation(f"a run failed: {[run.error for run in runs]}")
        clock = Clock()
        last = Leases(OUT, "z", clock=clock, sleep=clock.pass_s)
        last.claim("12", 2)
        clock.pass_s(EXPIRE_S)
        last.claim("12", 2)
        if last.claim("12", 2) or last.held_by_others():
            raise Violation("a dead run keeps a shard")

    explore(Scenario(begin, check), Bounds(preemptions=2, faults=1, states=600))
