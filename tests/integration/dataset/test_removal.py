"""Removed rows on S3: a data file is replaced on condition that nobody else did."""

from __future__ import annotations

from factories.hand_made import finish_with
from support.dataset_parts import commit, data_table, input_shard, make, names_of, success
from vitray.dataset import block_keys, drop_rows, read_footer, refresh_manifest
from vitray.storage import read, store_for


def test_an_object_that_was_rewritten_meanwhile_stays(quick_out: str) -> None:
    store = store_for(quick_out)
    url = f"{quick_out}/data/x.parquet"
    store.replace(url, b"first")
    version = store.stat(url).version
    store.replace(url, b"of another")
    assert not store.replace_version(url, version, b"second")
    assert read(url) == b"of another"
    assert store.replace_version(url, store.stat(url).version, b"third", {"vitray-rows": "1"})
    assert read(url) == b"third"
    store.delete([url])
    assert not store.replace_version(url, version, b"fourth")


def test_a_removal_rewrites_data_errors_manifest_and_success(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 9, {3: "empty", 5: "truncated"})
    finish_with(dataset, [shard.id], [shard.id])
    blocked = block_keys(quick_out, [f"{shard.id}/{n}" for n in (0, 3, 5)], {})
    drop = drop_rows(dataset, shard.id, blocked)
    refresh_manifest(dataset)
    assert (drop.rows, drop.errors) == (1, 2)
    assert data_table(dataset, shard)["index"].to_pylist() == [1, 2, 4, 6, 7, 8]
    assert read_footer(dataset.data_url(shard.id)).total == 9
    assert names_of(quick_out, "_errors/") == []
    marker = success(quick_out)
    assert marker is not None
    counts = (marker["rows"], marker["errors"], marker["left_out"])
    assert counts == (6, 0, {"removed": 3})
    assert names_of(quick_out, "manifest-") == [f"_vitray/{marker['manifest']}"]
