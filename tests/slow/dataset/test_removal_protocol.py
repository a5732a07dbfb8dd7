"""Removals, explored further than in the integration tests."""

from __future__ import annotations

import uuid
from functools import cache
from types import SimpleNamespace

import pytest

from support.explorer import Bounds, explore
from support.protocol_runs import current, next_write_id, tell
from support.removal_runs import REMOVALS
from vitray.dataset import identity
from vitray.storage import stores


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is the store of the execution at hand, and write-ids follow from who writes."""
    monkeypatch.setattr(stores, "s3_store", lambda *_: current.store)
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex=next_write_id()))
    monkeypatch.setattr(identity, "version", cache(identity.version))


@pytest.mark.nightly
@pytest.mark.parametrize("name", REMOVALS)
def test_no_order_and_no_fault_leaves_a_removed_key(name: str) -> None:
    result = explore(REMOVALS[name](), Bounds(preemptions=2, faults=1, states=6000))
    tell(name, result)
    assert result.ends >= 100
