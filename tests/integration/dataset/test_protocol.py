"""The commit protocol, explored: no order of runs and no fault breaks a promise."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from support.explorer import Bounds, MemoryStore, Run, Scenario, Violation, explore
from support.protocol_runs import OUT, SCENARIOS, a_grouping, current, next_write_id, scenario, tell
from vitray.dataset import NO_GROUP, append_group_log, identity, load_group_log
from vitray.errors import StorageError
from vitray.storage import stores


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is the store of the execution at hand, and write-ids follow from who writes: a repeated
    execution is the same.
    """
    monkeypatch.setattr(stores, "s3_store", lambda *_: current.store)
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex=next_write_id()))
    monkeypatch.setattr(
        identity, "version", cache(identity.version)
    )  # read thousands of times, most of the time that this took


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_and_no_fault_breaks_a_promise(name: str) -> None:
    result = explore(scenario(SCENARIOS[name]), Bounds(preemptions=2, faults=1, states=1500))
    tell(name, result)
    assert result.ends >= 30


def a_pruning(*urls: str) -> Callable[[], list[tuple[int, str]]]:
    """As pipeline.runner takes out what is gone: the files that a group still has, until none is
    left.
    """

    def work() -> list[tuple[int, str]]:
        for _ in range(5):
            log = load_group_log(OUT)
            homes = {url: group for group, url in log}
            if not (gone := [(NO_GROUP, url) for url in urls if homes[url] != NO_GROUP]):
                return log
            append_group_log(OUT, gone)
        raise StorageError("other runs keep appending")

    return work


def check_pruned(store: MemoryStore, runs: list[Run]) -> None:
    log = load_group_log(OUT)
    for url in {url for _, url in log}:
        groups = [group for group, name in log if name == url]
        if NO_GROUP in groups[::2] or set(groups[1::2]) - {NO_GROUP}:
            raise Violation(f"{url} enters where it is, or leaves where it is not: {log}")
    homes = {url: group for group, url in log}
    if all(run.error is None for run in runs) and homes != {"a": NO_GROUP, "b": NO_GROUP, "c": 1}:
        raise Violation(f"in the end: {log}")
    if any(run.error is not None and not run.met for run in runs):
        raise Violation(f"a run failed without a cause: {runs}")


@pytest.mark.parametrize("faults", [0, 1])
def test_two_runs_that_prune_and_one_that_appends_agree(faults: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        current.store = MemoryStore()
        append_group_log(OUT, [(0, "a"), (0, "b")])
        return current.store, [a_pruning("a"), a_pruning("a", "b"), a_grouping("a", "b", "c")]

    result = explore(
        Scenario(begin, check_pruned), Bounds(preemptions=2, faults=faults, states=3000)
    )
    tell(f"pruned groups, {faults} faults", result)
