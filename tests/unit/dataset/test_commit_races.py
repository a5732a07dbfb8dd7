"""Runs that commit the same shard at once, die on the way, or get no answer."""

from __future__ import annotations

from factories.hand_made import finish_with
from support.dataset_parts import commit, error_table, errors_of, input_shard, make
from vitray.storage import store_for


def test_a_crash_before_errors_is_repaired_by_finish(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 6, {1: "empty"})
    store_for(local_out).delete([dataset.errors_url(shard.id)])
    finish_with(dataset, [shard.id], [shard.id])
    assert error_table(dataset, shard).equals(errors_of(shard.id, {1: "empty"}))
