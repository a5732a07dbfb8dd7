"""The manifest step: the manifest, `_SUCCESS.json`, repairs and foreign files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from factories.hand_made import finish_with
from support.dataset_parts import (
    commit,
    copy_file,
    error_table,
    errors_of,
    input_shard,
    make,
    names_of,
    stage_fragments,
    stored,
    success,
)
from support.s3_proxy import Proxy
from vitray.dataset import (
    append_group_log,
    clean,
    commit_shard,
    committed_files,
    delete_data_files,
    read,
    read_manifest,
    staged_shards,
)
from vitray.storage import is_local, join, store_for
from vitray.storage import read as read_object


def test_finish_removes_the_staging_that_a_slower_run_left(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 6)
    stage_fragments(dataset, shard, 6, {})
    finish_with(dataset, [shard.id], [shard.id])
    assert staged_shards(dataset) == []


def test_finish_writes_manifest_and_success(out: str) -> None:
    dataset, one, two = make(out), input_shard(out, "one"), input_shard(out, "two")
    commit(dataset, one, 6, {1: "empty"})
    commit(dataset, two, 4)
    ids = [two.id, one.id]
    ledger = finish_with(dataset, ids, ids)
    assert (
        ledger.shards,
        ledger.rows,
        ledger.errors,
        ledger.truncated,
        ledger.pending,
        ledger.gone,
    ) == (2, 9, 1, {}, 0, 0)
    assert names_of(out, "manifest-") == [f"_vitray/{ledger.manifest}"]
    assert success(out) == {
        "shards": 2, "rows": 9, "errors": 1, "truncated": 0, "gone": 0, "manifest": ledger.manifest,
        "fingerprint": dataset.fingerprint, "left_out": {},
    }  # fmt: skip
    manifest = read_manifest(out)
    assert manifest is not None
    for row, shard, (rows, errors) in zip(
        manifest.to_pylist(), (one, two), ((5, 1), (4, 0)), strict=True
    ):
        body = read_object(dataset.data_url(shard.id))
        etag = row.pop("etag")
        assert is_local(out) or etag == hashlib.md5(body).hexdigest()
        assert row == {
            "shard": shard.id, "url": shard.url, "source_version": shard.version, "path": f"data/{shard.id}.parquet",
            "size_bytes": len(body), "rows": rows, "errors": errors, "truncated_at": None,
            "sha256": hashlib.sha256(body).hexdigest(), "state": "current", "left_out": "{}", "image_members": "{}",
        }  # fmt: skip


def test_a_second_finish_writes_nothing(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    commit(dataset, shard, 6, {1: "empty"})
    first = finish_with(dataset, [shard.id], [shard.id])
    files = stored(out)
    assert finish_with(dataset, [shard.id], [shard.id]) == first
    assert stored(out) == files


def test_a_second_finish_sends_no_write_that_could_change_anything(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    commit_shard(dataset, shard)
    finish_with(dataset, [shard.id], [shard.id])
    proxy.calls.clear()
    finish_with(dataset, [shard.id], [shard.id])
    writes = [call for call in proxy.calls if call.method not in ("GET", "HEAD")]
    assert all(
        call.method == "PUT"
        and call.headers.get("if-none-match") == "*"
        and "/manifest-" in call.path
        for call in writes
    )


def test_manifest_and_success_are_the_same_bytes_when_made_again(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 6, {1: "empty"})
    commit(dataset, two, 4)
    ids = [one.id, two.id]
    first = finish_with(dataset, ids, ids)
    urls = [join(quick_out, "_SUCCESS.json"), join(quick_out, "_vitray", first.manifest)]
    contents = [read_object(url) for url in urls]
    store_for(quick_out).delete(urls)
    assert finish_with(dataset, list(reversed(ids)), ids) == first
    assert [read_object(url) for url in urls] == contents


def test_finish_repairs_errors_and_removes_what_belongs_to_nothing(quick_out: str) -> None:
    dataset, one, two = (
        make(quick_out),
        input_shard(quick_out, "one"),
        input_shard(quick_out, "two"),
    )
    commit(dataset, one, 4, {0: "empty"})
    commit(dataset, two, 4)
    first = finish_with(dataset, [one.id], [one.id])
    copy_file(
        dataset,
        join(quick_out, "_vitray", first.manifest),
        join(quick_out, "_vitray", "manifest-0123456789abcdef.parquet"),
    )
    copy_file(dataset, dataset.errors_url(one.id), dataset.errors_url(two.id))
    copy_file(dataset, dataset.errors_url(one.id), dataset.errors_url("never-0-0"))
    store_for(quick_out).delete([dataset.errors_url(one.id)])
    ledger = finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert names_of(quick_out, "_errors/") == [f"_errors/{one.id}.parquet"]
    assert error_table(dataset, one).equals(errors_of(one.id, {0: "empty"}))
    assert names_of(quick_out, "manifest-") == [f"_vitray/{ledger.manifest}"]


def test_a_data_file_deleted_by_hand_and_made_again_has_its_own_hash_in_the_manifest(
    quick_out: str,
) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    store_for(quick_out).delete([dataset.data_url(shard.id)])
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    manifest = read_manifest(quick_out)
    assert manifest is not None
    assert manifest["sha256"].to_pylist() == [
        hashlib.sha256(read_object(dataset.data_url(shard.id))).hexdigest()
    ]


def test_a_success_that_names_a_lost_manifest_is_healed(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 4)
    first = finish_with(dataset, [shard.id], [shard.id])
    store_for(quick_out).delete([join(quick_out, "_vitray", first.manifest)])
    assert read_manifest(quick_out) is None and read(quick_out).num_rows == 4
    assert (
        finish_with(dataset, [shard.id], [shard.id]) == first
        and read_manifest(quick_out) is not None
    )


def test_a_name_with_manifest_in_it_is_no_manifest(quick_out: str) -> None:
    out = join(quick_out, "manifest-run")
    dataset, done, underway = (
        make(out),
        input_shard(out, "manifest-done"),
        input_shard(out, "manifest-2026"),
    )
    commit(dataset, done, 4)
    stage_fragments(dataset, underway, 8, {})
    append_group_log(out, [(0, "s3://b/a")])
    files = set(stored(out))
    ledger = finish_with(dataset, [done.id, underway.id], [done.id, underway.id])
    assert finish_with(dataset, [done.id, underway.id], [done.id, underway.id]) == ledger
    assert set(stored(out)) == files | {f"_vitray/{ledger.manifest}"}
    delete_data_files(dataset, [])
    assert set(stored(out)) == files
    assert clean(dataset, [underway.id]) == [] and set(stored(out)) == files


def test_a_manifest_that_another_run_replaces_while_it_is_read_is_looked_for_again(
    quick_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitray.dataset import ledger

    dataset, one = make(quick_out), input_shard(quick_out)
    commit(dataset, one, 6)
    finish_with(dataset, [one.id], [one.id])
    real, chances = ledger.read_parquet, iter([True])

    def overtaken(url: str) -> pa.Table:
        if next(chances, False):
            commit(dataset, input_shard(quick_out, "dogs"), 4)
            two = sorted(committed_files(quick_out))
            finish_with(dataset, two, two)
        return real(url)

    monkeypatch.setattr(ledger, "read_parquet", overtaken)
    assert read_manifest(quick_out)["rows"].to_pylist() == [6, 4]
