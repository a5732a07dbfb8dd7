"""Inputs that changed, went or came: what the manifest step keeps and what it removes."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest

from factories.hand_made import finish_with
from support.dataset_parts import commit, input_shard, make
from vitray.dataset import (
    base_of,
    committed_files,
    data_files,
    read,
    read_manifest,
    unmark_success,
    write_manifest,
)
from vitray.errors import StorageError
from vitray.storage import join, sha256_of, store_for


def test_a_manifest_of_before_the_change_still_names_the_old_version(local_out: str) -> None:
    dataset, old = make(local_out), input_shard(local_out, "photos", b"version 1")
    commit(dataset, old, 4)
    finish_with(dataset, [old.id], [old.id])
    new = input_shard(local_out, "photos", b"version 2, longer")
    commit(dataset, new, 6)
    assert data_files(local_out) == [dataset.data_url(old.id)], (
        "the run that changes it has not come to its manifest step"
    )
    unmark_success(local_out)  # a manifest step that was killed after its first deletes
    store_for(local_out).delete([dataset.data_url(old.id)])
    assert data_files(local_out) == [dataset.data_url(new.id)]


def test_ranges_of_one_file_are_shards_of_one_version(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out, "rows")
    ranges = [
        replace(shard, id=shard.id.replace("rows-", f"rows-rg{n}-{n + 1}-"), start=n, stop=n + 1)
        for n in range(3)
    ]
    commit(dataset, ranges[0], 4)
    finish_with(dataset, [s.id for s in ranges], [s.id for s in ranges])
    commit(dataset, ranges[1], 4)
    assert data_files(local_out) == [dataset.data_url(s.id) for s in ranges[:2]], (
        "committed since the manifest: rows count at once"
    )
    commit(dataset, ranges[2], 4)
    assert read(local_out).num_rows == 12
    newer = input_shard(local_out, "rows", b"longer by far than it was")
    finish_with(dataset, [newer.id], [newer.id])
    assert len(committed_files(local_out)) == 3
    commit(dataset, newer, 5)
    finish_with(dataset, [newer.id], [newer.id])
    assert list(committed_files(local_out)) == [newer.id]


def test_a_file_made_anew_under_a_clock_that_went_back_is_hashed_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)

    def list_ids() -> tuple[list[str], list[str]]:
        return [shard.id], [shard.id]

    commit(dataset, shard, 6)
    first = write_manifest(dataset, list_ids)
    os.utime(f"{local_out}/_vitray/{first.manifest}", (time.time() + 7200,) * 2)
    os.remove(dataset.data_url(shard.id))
    commit(dataset, shard, 6)
    write_manifest(dataset, list_ids, fresh={shard.id})
    assert read_manifest(local_out)["sha256"].to_pylist() == [sha256_of(dataset.data_url(shard.id))]


def test_a_listing_that_never_knows_what_others_commit_removes_nothing_and_says_so(
    local_out: str,
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)

    def list_ids() -> tuple[list[str], list[str]]:
        commit(dataset, input_shard(local_out, f"new-{len(committed_files(local_out))}"), 2)
        return [shard.id], [shard.id]

    with pytest.raises(StorageError, match="another run committed"):
        write_manifest(dataset, list_ids, prune=True)
    assert len(committed_files(local_out)) == 4 and not os.path.exists(
        join(local_out, "_SUCCESS.json")
    )


def test_inputs_whose_hashes_are_equal_are_two_where_their_names_differ() -> None:
    assert base_of("cats-0123456789-aaaaaaaa") == base_of("cats-rg0-4-0123456789-bbbbbbbb")
    assert base_of("cats-0123456789-aaaaaaaa") != base_of("dogs-0123456789-aaaaaaaa")
