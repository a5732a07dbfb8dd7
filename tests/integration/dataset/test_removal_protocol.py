"""Removals, explored: no order of calls beside runs and no fault leaves a removed key."""

from __future__ import annotations

import uuid
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from support.explorer import Bounds, Violation, explore
from support.protocol_runs import current, next_write_id, tell
from support.removal_runs import REMOVALS
from vitray.dataset import commit, identity
from vitray.storage import stores


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is the store of the execution at hand, and write-ids follow from who writes."""
    monkeypatch.setattr(stores, "s3_store", lambda *_: current.store)
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex=next_write_id()))
    monkeypatch.setattr(identity, "version", cache(identity.version))


@pytest.mark.parametrize("name", REMOVALS)
def test_no_order_and_no_fault_leaves_a_removed_key(name: str) -> None:
    result = explore(REMOVALS[name](), Bounds(preemptions=2, faults=1, states=400))
    tell(name, result)
    assert result.ends >= 10


def test_no_order_brings_a_removed_key_back_among_error_rows() -> None:
    play = REMOVALS["a removal beside a worker with bad images"]()
    result = explore(play, Bounds(preemptions=2, faults=0, states=3000))
    tell("error rows", result)
    assert result.complete


def rewritten_without_condition(patch: pytest.MonkeyPatch) -> None:
    def replace(url: str, version: str, data: bytes, *_: Any) -> bool:
        current.store.replace(url, data)
        return True

    patch.setattr(current.store.__class__, "replace_version", lambda _, *args: replace(*args))


def committed_without_a_second_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "_checked_again", lambda dataset, footer: footer)


def error_rows_after_the_second_look(patch: pytest.MonkeyPatch) -> None:
    look, write = commit._checked_again, commit.write_errors

    def look_then_write(dataset: Any, footer: Any) -> Any:
        footer = look(dataset, footer)
        write(dataset, footer)
        return footer

    patch.setattr(commit, "write_errors", lambda *_: None)
    patch.setattr(commit, "_checked_again", look_then_write)


MUTANTS = {
    error_rows_after_the_second_look: "a removal beside a worker with bad images",
    rewritten_without_condition: "two removals of a committed shard",
    committed_without_a_second_look: "a removal beside a worker",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mistake_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    play = REMOVALS[MUTANTS[mutant]]()
    mutant(monkeypatch)
    with pytest.raises(Violation):
        explore(play, Bounds(preemptions=2, faults=0, states=3000))
