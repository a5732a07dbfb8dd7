"""Rows that are removed for good: from data files, staging and later commits."""

from __future__ import annotations

import pyarrow as pa
import pytest

from factories.hand_made import finish_with
from support.dataset_parts import (
    commit,
    data_table,
    error_table,
    errors_of,
    input_shard,
    make,
    names_of,
    rows_of,
    stage,
)
from vitray.dataset import (
    Dataset,
    Fragment,
    RemovedKeys,
    block_keys,
    commit_shard,
    commit_whole,
    drop_removed_fragments,
    drop_rows,
    hash_of,
    list_staged,
    read_footer,
    read_fragment,
    refresh_manifest,
    removed_keys,
)
from vitray.schema import End, Shard
from vitray.storage import read, store_for

TOTAL = 9


def keys_of(shard: Shard, *indexes: int) -> list[str]:
    return [f"{shard.id}/{index}" for index in indexes]


def indexes(table: pa.Table) -> list[int]:
    return list(table["index"].to_pylist())


@pytest.mark.parametrize(
    ("blocked", "good", "bad", "removed"),
    [
        ([], [0, 2, 3], [1], 0),
        ([0], [2, 3], [1], 1),
        ([1], [0, 2, 3], [], 1),
        ([2, 3], [0], [1], 2),
        ([0, 1, 2, 3], [], [], 4),
        ([7], [0, 2, 3], [1], 0),
    ],
)
def test_rows_of_blocked_keys_are_left_out_and_counted(
    local_out: str, blocked: list[int], good: list[int], bad: list[int], removed: int
) -> None:
    rows = rows_of(make(local_out), "s", [0, 2, 3])
    keys = RemovedKeys(1, frozenset(hash_of(f"s/{index}") for index in blocked))
    fragment = keys.filter(Fragment(rows, errors_of("s", {1: "empty"}), {"further_image": 5}))
    assert (indexes(fragment.rows), indexes(fragment.errors)) == (good, bad)
    expected = {"further_image": 5} | ({"removed": removed} if removed else {})
    assert fragment.left_out == expected


def test_a_later_commit_writes_no_row_for_a_blocked_key(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    block_keys(local_out, keys_of(shard, 2, 3), {})
    done = commit(dataset, shard, TOTAL, {3: "empty", 5: "empty"})
    footer = read_footer(dataset.data_url(shard.id))
    assert indexes(data_table(dataset, shard)) == [0, 1, 4, 6, 7, 8]
    assert indexes(footer.error_rows) == [5]
    assert (done.rows, done.errors, footer.left_out) == (6, 1, {"removed": 2})
    assert (footer.total, footer.removals) == (TOTAL, 1)


def test_a_whole_shard_in_memory_loses_blocked_keys(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    block_keys(local_out, keys_of(shard, 0), {})
    rows = rows_of(dataset, shard.id, [0, 1])
    commit_whole(dataset, shard, rows, errors_of(shard.id, {2: "empty"}), End(3))
    assert indexes(data_table(dataset, shard)) == [1]
    assert read_footer(dataset.data_url(shard.id)).total == 3


def test_fragments_staged_before_a_removal_lose_its_keys_at_the_commit(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, TOTAL)
    block_keys(local_out, keys_of(shard, 1, 8), {})
    assert commit_shard(dataset, shard) is not None
    assert indexes(data_table(dataset, shard)) == [0, 2, 3, 4, 5, 6, 7]


def test_a_removal_deletes_the_staged_fragments_with_its_keys(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, TOTAL)
    blocked = block_keys(local_out, keys_of(shard, 5), {})
    assert drop_removed_fragments(dataset, blocked, only_look=True) == 1
    assert drop_removed_fragments(dataset, blocked) == 1
    assert list_staged(dataset, shard.id).ranges() == [(0, 4), (8, 9)]
    stage(dataset, shard, TOTAL)  # as the next run does
    fragment = read_fragment(dataset, shard.id, 4, 8)
    assert fragment is not None and indexes(fragment.rows) == [4, 6, 7]
    assert fragment.left_out == {"removed": 1}


def test_a_rewritten_data_file_is_one_without_these_rows(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL, {3: "empty", 5: "truncated"})
    before = data_table(dataset, shard)
    blocked = block_keys(local_out, keys_of(shard, 0, 3, 6), {})
    drop = drop_rows(dataset, shard.id, blocked)
    assert (drop.rows, drop.errors) == (2, 1)
    after = data_table(dataset, shard)
    assert after.equals(before.filter(pa.array(i not in (0, 6) for i in indexes(before))))
    footer = read_footer(dataset.data_url(shard.id))
    assert (footer.rows, footer.errors, footer.reasons) == (5, 1, {"truncated": 1})
    assert (footer.total, footer.left_out) == (TOTAL, {"removed": 3})
    assert error_table(dataset, shard).equals(errors_of(shard.id, {5: "truncated"}))
    data = read(dataset.data_url(shard.id))
    assert not any(key.encode() in data for key in keys_of(shard, 0, 3, 6))
    assert drop_rows(dataset, shard.id, blocked).rows == 0


def test_the_last_error_row_takes_its_file_along(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL, {3: "empty"})
    drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, 3), {}))
    assert names_of(local_out, "_errors/") == []


def test_a_file_that_was_rewritten_meanwhile_stays(local_out: str) -> None:
    store = store_for(local_out)
    url = f"{local_out}/data/x.parquet"
    store.replace(url, b"first")
    version = store.stat(url).version
    store.replace(url, b"of another")
    assert not store.replace_version(url, version, b"second")
    assert read(url) == b"of another"
    assert store.replace_version(url, store.stat(url).version, b"third", {"vitray-rows": "1"})
    assert read(url) == b"third"
    store.delete([url])
    assert not store.replace_version(url, version, b"fourth")


def test_stale_error_rows_are_repaired_by_the_same_removal(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL, {3: "empty", 5: "truncated"})
    stale = read(dataset.errors_url(shard.id))
    blocked = block_keys(local_out, keys_of(shard, 3), {})
    drop_rows(dataset, shard.id, blocked)
    store_for(local_out).replace(dataset.errors_url(shard.id), stale)
    drop = drop_rows(dataset, shard.id, blocked)
    assert (drop.rows, drop.errors) == (0, 0)
    assert error_table(dataset, shard).equals(errors_of(shard.id, {5: "truncated"}))


def test_stale_error_rows_of_a_shard_without_errors_are_deleted(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL, {3: "empty"})
    stale = read(dataset.errors_url(shard.id))
    blocked = block_keys(local_out, keys_of(shard, 3), {})
    drop_rows(dataset, shard.id, blocked)
    store_for(local_out).replace(dataset.errors_url(shard.id), stale)
    drop_rows(dataset, shard.id, blocked)
    assert names_of(local_out, "_errors/") == []


@pytest.mark.parametrize("content", [b"", None], ids=["damaged", "stale"])
def test_the_next_run_repairs_error_rows_that_differ(local_out: str, content: bytes | None) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL, {3: "empty", 5: "truncated"})
    stale = read(dataset.errors_url(shard.id)) if content is None else content
    drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, 3), {}))
    finish_with(dataset, [shard.id], [shard.id])
    store_for(local_out).replace(dataset.errors_url(shard.id), stale)
    finish_with(dataset, [shard.id], [shard.id])
    assert error_table(dataset, shard).equals(errors_of(shard.id, {5: "truncated"}))


def removed_dataset(out: str) -> tuple[Dataset, Shard]:
    dataset, shard = make(out), input_shard(out)
    commit(dataset, shard, TOTAL, {3: "empty"})
    finish_with(dataset, [shard.id], [shard.id])
    return dataset, shard


def test_manifest_and_success_follow_a_removal_without_the_source(local_out: str) -> None:
    dataset, shard = removed_dataset(local_out)
    store_for(local_out).delete([shard.url])
    drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, 1, 3), {}))
    refresh_manifest(dataset)
    after = names_of(local_out, "manifest-")
    assert len(after) == 1
    summary = finish_with(dataset, [shard.id], [shard.id])
    assert (summary.rows, summary.errors, summary.left_out) == (7, 0, {"removed": 2})
    assert names_of(local_out, "manifest-") == after


def test_an_incomplete_dataset_stays_incomplete(local_out: str) -> None:
    dataset, shard = removed_dataset(local_out)
    finish_with(dataset, [shard.id, "new-1-2"], [shard.id, "new-1-2"])
    drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, 1), {}))
    refresh_manifest(dataset)
    assert names_of(local_out, "_SUCCESS") == []


def test_the_next_run_takes_out_what_a_killed_one_committed_beside_a_removal(
    local_out: str,
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL)  # without a look at the keys that are blocked now
    block_keys(local_out, keys_of(shard, 4), {})
    summary = finish_with(dataset, [shard.id], [shard.id])
    assert (summary.rows, summary.left_out) == (TOTAL - 1, {"removed": 1})
    assert 4 not in indexes(data_table(dataset, shard))


def test_keys_are_stored_as_hashes_and_once(local_out: str) -> None:
    block_keys(local_out, ["a person", "b"], {"by": "ann"})
    assert block_keys(local_out, ["b", "a person"], {"by": "bob"}).lists == 1
    assert block_keys(local_out, ["b", "c"], {"by": "bob"}) == removed_keys(local_out)
    names = names_of(local_out, "removed/")
    assert names == ["_vitray/removed/000000.json", "_vitray/removed/000001.json"]
    assert b"a person" not in read(f"{local_out}/{names[0]}")
    assert removed_keys(local_out).hashes == {hash_of("a person"), hash_of("b"), hash_of("c")}


def test_a_list_that_was_deleted_by_hand_blocks_nothing_and_hides_no_later_one(
    local_out: str,
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, TOTAL)
    for index in (0, 1):
        drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, index), {}))
    store_for(local_out).delete([f"{local_out}/_vitray/removed/000001.json"])
    assert removed_keys(local_out).hashes == {hash_of(keys_of(shard, 0)[0])}
    drop_rows(dataset, shard.id, block_keys(local_out, keys_of(shard, 2), {}))
    assert indexes(data_table(dataset, shard)) == [3, 4, 5, 6, 7, 8]
