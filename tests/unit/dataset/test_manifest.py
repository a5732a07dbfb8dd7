"""The manifest step: the manifest, `_SUCCESS.json`, repairs and foreign files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from factories.hand_made import finish_with
from support.dataset_parts import commit, input_shard, make, names_of, parquet_bytes, success
from vitray.errors import CommitError, FingerprintError
from vitray.storage import exists, join, store_for
from vitray.storage import read as read_object


def test_a_file_of_another_job_put_into_data_is_refused_by_finish(
    local_out: str, tmp_path: Path
) -> None:
    own, other = make(local_out), make(str(tmp_path / "other"), top_k=2)
    shard = input_shard(local_out)
    commit(other, shard, 6)
    store_for(local_out).create(own.data_url(shard.id), read_object(other.data_url(shard.id)))
    with pytest.raises(FingerprintError, match="of another job"):
        finish_with(own, [shard.id], [shard.id])
    assert not exists(join(local_out, "_SUCCESS.json"))


def test_pending_shards_mean_no_success(local_out: str) -> None:
    dataset, one, two = (
        make(local_out),
        input_shard(local_out, "one"),
        input_shard(local_out, "two"),
    )
    commit(dataset, one, 4)
    ledger = finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert (ledger.pending, ledger.rows) == (1, 4) and success(local_out) is None
    assert names_of(local_out, "manifest-") == [f"_vitray/{ledger.manifest}"]
    assert finish_with(dataset, [one.id, two.id], [one.id]).pending == 0, (
        "`limit` left the other one local_out"
    )
    assert success(local_out) is not None
    finish_with(dataset, [one.id, two.id], [one.id, two.id])
    assert success(local_out) is None


def test_an_empty_dataset_can_be_finished(local_out: str) -> None:
    ledger = finish_with(make(local_out), [], [])
    assert (ledger.shards, ledger.rows, ledger.pending) == (0, 0, 0)


@pytest.mark.parametrize("name", ["part", "part-0", "a-b-c-d"])
def test_a_foreign_file_in_data_is_named(local_out: str, name: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 4)
    store_for(local_out).create(dataset.data_url(name), parquet_bytes(pa.table({"a": [1]})))
    with pytest.raises(CommitError, match=rf"data/{name}\.parquet is not a data file of vitray"):
        finish_with(dataset, [shard.id], [shard.id])
    assert exists(dataset.data_url(name)) and success(local_out) is None
