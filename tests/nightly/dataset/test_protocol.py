"""The commit protocol, explored: no order of runs and no fault breaks a promise."""

from __future__ import annotations

import uuid
from functools import cache
from types import SimpleNamespace

import pytest

from support.explorer import Bounds, explore
from support.protocol_runs import SCENARIOS, current, next_write_id, scenario, tell
from vitray.dataset import identity
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


@pytest.mark.parametrize("faults", [0, 1, 2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_states_hold(name: str, faults: int) -> None:
    result = explore(scenario(SCENARIOS[name]), Bounds(preemptions=3, faults=faults, states=20_000))
    tell(f"{name}, {faults} faults", result)


@pytest.mark.timeout(900)
def test_every_order_of_two_runs_and_a_changing_input_holds() -> None:
    """With at most two preemptions and no fault, all of them."""
    result = explore(
        scenario(SCENARIOS["two runs, and the input changes"]),
        Bounds(preemptions=2, faults=0, states=200_000),
    )
    tell("two runs, and the input changes", result)
    assert result.complete and result.states > 50_000
