"""A commit: rows in order, errors beside them, metadata, and what is not committed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from factories.hand_made import finish_with
from support.dataset_parts import (
    FACTS,
    KEPT,
    NOW,
    VECTOR,
    D,
    commit,
    copy_file,
    data_table,
    error_table,
    errors_of,
    input_shard,
    job_for,
    make,
    parquet_bytes,
    stage,
    stage_fragments,
    staging,
    stored,
    vector,
)
from vitray.dataset import (
    Commit,
    commit_shard,
    committed_files,
    list_staged,
    read,
    read_footer,
    repair_staging,
    require_own_data_files,
    resolve_dataset,
    write_end,
)
from vitray.errors import CommitError
from vitray.schema import End, VectorColumn
from vitray.storage import exists, store_for
from vitray.storage import read as read_object


def test_a_shard_without_a_good_row_has_the_same_schema(local_out: str) -> None:
    job = job_for(local_out, keep=["caption", "stars"])
    dataset = resolve_dataset(job, FACTS, [VECTOR], KEPT, NOW)
    full, empty, bad = (input_shard(local_out, name) for name in ("full", "empty", "bad"))
    commit(dataset, full, 5)
    assert commit(dataset, empty, 0) == Commit(empty.id, 0, 0, {}, None, False)
    wrong = dict.fromkeys(range(5), "not_an_image")
    assert commit(dataset, bad, 5, wrong) == Commit(bad.id, 0, 5, {"not_an_image": 5}, None, False)
    tables = [data_table(dataset, shard) for shard in (full, empty, bad)]
    assert [t.num_rows for t in tables] == [5, 0, 0]
    assert all(t.schema.remove_metadata().equals(dataset.schema) for t in tables)
    assert error_table(dataset, bad).equals(errors_of(bad.id, wrong)) and not exists(
        dataset.errors_url(empty.id)
    )
    assert read_footer(dataset.data_url(empty.id)).rows_sha256 == hashlib.sha256().hexdigest()
    assert read(local_out).num_rows == 5


def test_a_truncated_shard_is_committed_with_that_verdict(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 5, {4: "truncated"}, truncated_at=12_345)
    assert commit_shard(dataset, shard) == Commit(shard.id, 4, 1, {"truncated": 1}, 12_345, False)
    assert read_footer(dataset.data_url(shard.id)).truncated_at == 12_345
    ledger = finish_with(dataset, [shard.id], [shard.id])
    assert ledger.truncated == {shard.id: 12_345}


def test_kept_columns_and_float16_vectors_arrive(local_out: str) -> None:
    vectors = [VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16")]
    dataset = resolve_dataset(
        job_for(local_out, keep=["caption", "stars"]), FACTS, vectors, KEPT, NOW
    )
    shard = input_shard(local_out)
    commit(dataset, shard, 9, {3: "empty"})
    table, good = read(local_out), [0, 1, 2, 4, 5, 6, 7, 8]
    assert table["caption"].to_pylist() == [None if i % 4 == 1 else f"caption {i}" for i in good]
    assert table["stars"].to_pylist() == [None if i % 5 == 2 else i for i in good]
    half = np.stack(table["embedding_h"].to_numpy())
    assert half.dtype == np.float16 and np.array_equal(
        half, np.stack([vector(i) for i in good]).astype(np.float16)
    )
    assert table.schema.field("embedding_h").type == dataset.schema.field("embedding_h").type


def test_a_link_that_was_made_and_then_refused_is_a_commit(
    local_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client of NFS sees when the answer to its first request was lost and the second finds
    the name taken.
    """
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    dataset, shard = make(local_out), input_shard(local_out)
    monkeypatch.setattr(os, "link", twice)
    first = commit(dataset, shard, 6, {1: "empty"})
    assert (first.rows, first.errors) == (5, 1)
    assert data_table(dataset, shard)["index"].to_pylist() == [0, 2, 3, 4, 5]
    assert error_table(dataset, shard)["index"].to_pylist() == [1] and staging(dataset) == []


def test_missing_fragments_are_no_commit(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    assert commit_shard(dataset, shard) is None
    stage_fragments(dataset, shard, 8, {})
    assert commit_shard(dataset, shard) is None, "the end is not known"
    write_end(dataset, shard.id, End(12))
    assert commit_shard(dataset, shard) is None
    assert committed_files(local_out) == {} and len(staging(dataset)) == 3, "what is staged stays"


def test_readers_that_disagree_on_the_end_start_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 8)
    write_end(dataset, shard.id, End(6, 100))
    assert commit_shard(dataset, shard) is None
    assert staging(dataset) == [] and committed_files(local_out) == {}
    assert commit(dataset, shard, 8).rows == 8


def test_a_damaged_fragment_is_not_committed_and_is_made_anew(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 8)
    url = Path(dataset.staging_url(shard.id)) / "0000000004-0000000008.arrow"
    url.write_bytes(url.read_bytes()[:-500])
    assert commit_shard(dataset, shard) is None
    assert committed_files(local_out) == {}
    assert list(repair_staging(dataset, shard.id).ranges()) == [(0, 4)]
    assert commit(dataset, shard, 8).rows == 8


def damaged_parquet() -> bytes:
    body = bytearray(parquet_bytes(pa.table({"a": list(range(100))})))
    body[-200:-20] = b"\x7f" * 180
    return bytes(body)


@pytest.mark.parametrize(
    "body",
    [b"", b"not Parquet", parquet_bytes(pa.table({"a": [1]})), damaged_parquet()],
    ids=["empty", "text", "foreign", "damaged"],
)
def test_a_foreign_file_in_place_is_an_error_and_stays(local_out: str, body: bytes) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 4)
    store_for(local_out).replace(dataset.data_url(shard.id), body)
    with pytest.raises(
        CommitError, match=r"is not a data file of vitray.*Move it away and run again\.$"
    ):
        commit_shard(dataset, shard)
    assert (
        read_object(dataset.data_url(shard.id)) == body and list_staged(dataset, shard.id).covers()
    )


def test_a_file_of_another_fingerprint_is_an_error(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    other = replace(dataset, spec=replace(FACTS, precision="bf16"))
    commit(other, shard, 4)
    content = read_object(dataset.data_url(shard.id))
    stage(dataset, shard, 4)
    with pytest.raises(
        CommitError, match=rf"fingerprint {other.fingerprint[:8]}.*{dataset.fingerprint[:8]}"
    ):
        commit_shard(dataset, shard)
    assert read_object(dataset.data_url(shard.id)) == content


def test_a_data_file_under_the_name_of_another_shard_is_refused(local_out: str) -> None:
    dataset = make(local_out)
    cats, dogs = input_shard(local_out), input_shard(local_out, "dogs")
    for shard in (cats, dogs):
        commit(dataset, shard, 6, {1: "empty"})
    finish_with(dataset, [cats.id, dogs.id], [cats.id, dogs.id])
    files = stored(local_out)
    store_for(local_out).replace(dataset.data_url(cats.id), read_object(dataset.data_url(dogs.id)))
    changed = stored(local_out)
    for check in (
        lambda: require_own_data_files(dataset),
        lambda: finish_with(dataset, [cats.id, dogs.id], [cats.id, dogs.id]),
    ):
        with pytest.raises(CommitError, match=f"{cats.id}.parquet holds shard dogs-"):
            check()
    assert stored(local_out) == changed != files


def test_a_file_of_another_shard_is_an_error(local_out: str) -> None:
    dataset, one, two = (
        make(local_out),
        input_shard(local_out, "one"),
        input_shard(local_out, "two"),
    )
    commit(dataset, one, 4)
    copy_file(dataset, dataset.data_url(one.id), dataset.data_url(two.id))
    with pytest.raises(CommitError):
        commit_shard(dataset, two)
