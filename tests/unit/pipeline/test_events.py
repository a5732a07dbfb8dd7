"""Events: what reaches the driver, small and comparable."""

from __future__ import annotations

import pickle

import pytest

from vitray.dataset import Commit
from vitray.pipeline.events import (
    Event,
    FragmentSkipped,
    FragmentWritten,
    ShardBroken,
    ShardChanged,
    ShardCommitted,
    ShardEnded,
    ShardFailed,
    ShardOutcome,
    WorkerLost,
    WorkerReady,
    WorkerStopped,
    errors_of,
)
from vitray.schema import End

COMMIT = Commit(shard="a", rows=3, errors=1, reasons={"empty": 1}, truncated_at=None, adopted=False)
EVENTS: list[Event] = [
    FragmentWritten("a", 0, 4, {"empty": 1}, {"read": 0.1}, 100, {"hidden": 2}, 50),
    FragmentSkipped("a", 4, 8, {"empty": 1}),
    ShardEnded("a", End(8, note="its end is missing")),
    ShardCommitted("a", COMMIT),
    ShardFailed("a", "the store is slow"),
    ShardBroken("a", "it is not a tar"),
    ShardChanged("a"),
    WorkerReady("w", 3, 512),
    WorkerStopped("w"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_travel_between_processes(event: Event) -> None:
    assert pickle.loads(pickle.dumps(event)) == event


def test_a_lost_worker_travels_with_its_error() -> None:
    event = pickle.loads(pickle.dumps(WorkerLost("w", RuntimeError("no memory"), is_machine=True)))
    assert (event.worker, str(event.error), event.is_machine) == ("w", "no memory", True)


def test_outcomes_are_what_ends_an_attempt_at_a_shard() -> None:
    outcomes = {type(event) for event in EVENTS if isinstance(event, ShardOutcome)}
    assert outcomes == {ShardCommitted, ShardFailed, ShardBroken, ShardChanged}


@pytest.mark.parametrize("kind", [FragmentWritten, FragmentSkipped])
def test_errors_of_a_fragment_are_those_of_all_reasons(
    kind: type[FragmentWritten] | type[FragmentSkipped],
) -> None:
    assert errors_of(kind("a", 0, 8, {"empty": 2, "truncated": 3})) == 5
    assert errors_of(kind("a", 0, 8)) == 0
