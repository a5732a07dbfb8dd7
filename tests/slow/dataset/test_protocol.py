"""The commit protocol, explored: no order of runs and no fault breaks a promise."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from support.dataset_parts import make
from support.explorer import Bounds, Died, MemoryStore, Run, Scenario, Violation, explore
from support.protocol_runs import OUT, a_grouping, current, next_write_id, tell
from vitray.dataset import identity
from vitray.errors import FingerprintError
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


def check_one_dataset(store: MemoryStore, runs: list[Run]) -> None:
    answers = [run.result for run in runs if run.error is None]
    if len({a.fingerprint for a in answers}) > 1:
        raise Violation("two runs work on two datasets in one OUT")
    for run in runs:
        if (
            run.error is not None
            and not isinstance(run.error, Died | FingerprintError)
            and not run.met
        ):
            raise Violation(f"a run failed without a cause: {run.error!r}")


@pytest.mark.parametrize(
    "top_k", [pytest.param(2, marks=pytest.mark.nightly), 3]
)  # the same job, another
def test_one_of_two_first_runs_decides_what_the_dataset_is(top_k: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        current.store = MemoryStore()
        return current.store, [lambda: make(OUT, top_k=2), lambda: make(OUT, top_k=top_k)]

    result = explore(
        Scenario(begin, check_one_dataset), Bounds(preemptions=4, faults=2, states=20_000)
    )
    tell("dataset.json", result)
    assert result.complete


def check_groups(store: MemoryStore, runs: list[Run]) -> None:
    log = a_grouping("a", "b", "c")()
    urls = [url for _, url in log]
    if sorted(urls) != ["a", "b", "c"]:
        raise Violation(f"a path is in two groups, or in none: {log}")
    for run in runs:
        if run.error is None and not set(run.result) <= set(log):
            raise Violation(f"a run works with {run.result}, the log says {log}")
        if run.error is not None and not run.met:
            raise Violation(f"a run failed without a cause: {run.error!r}")


@pytest.mark.parametrize("faults", [0, 1, 2])
def test_a_path_is_in_one_group_whoever_appends(faults: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        current.store = MemoryStore()
        return current.store, [a_grouping("a", "b"), a_grouping("b", "c"), a_grouping("a", "c")]

    result = explore(
        Scenario(begin, check_groups), Bounds(preemptions=2, faults=faults, states=3000)
    )
    tell(f"groups, {faults} faults", result)
