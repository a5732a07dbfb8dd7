"""Data files as readers see them; run records, redo and clean."""

from __future__ import annotations

import pytest

from factories.hand_made import finish_with
from support.dataset_parts import commit, input_shard, make, stage, stage_fragments, stored
from vitray.dataset import clean
from vitray.storage import join, store_for


def test_clean_removes_orphans_only(quick_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(quick_out)
    done, unlisted, underway = (
        input_shard(quick_out, name) for name in ("done", "unlisted", "underway")
    )
    commit(dataset, done, 4, {0: "empty"})
    finish_with(dataset, [done.id, underway.id], [done.id, underway.id])
    committed_files = set(stored(quick_out))
    stage_fragments(dataset, underway, 8, {})
    working = set(stored(quick_out))
    stage(dataset, done, 4)
    stage(dataset, unlisted, 8)
    store_for(quick_out).create(nonce := join(quick_out, "_vitray", "probe-12ab"), b"vitray probe")
    assert clean(dataset, [done.id, underway.id]) == sorted([done.id, unlisted.id])
    assert set(stored(quick_out)) == working | {
        nonce.removeprefix(f"{quick_out}/")
    }  # a run may be at work with it
    monkeypatch.setattr("vitray.dataset.scratch_space.ABANDONED_S", -60)
    assert clean(dataset, [done.id, underway.id]) == ["_vitray/probe-12ab"]
    assert set(stored(quick_out)) == working and len(working - committed_files) == 2
    assert clean(dataset, [done.id, underway.id]) == []
