"""Data files as readers see them; run records, redo and clean."""

from __future__ import annotations

import os

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories.hand_made import finish_with
from support.dataset_parts import (
    FACTS,
    NOW,
    VECTOR,
    D,
    commit,
    input_shard,
    job_for,
    make,
    names_of,
    rows_of,
    stage,
    success,
    vector,
)
from vitray.dataset import (
    append_group_log,
    committed_files,
    data_files,
    delete_data_files,
    load_group_log,
    read,
    read_manifest,
    read_run_records,
    resolve_dataset,
    shards_to_redo,
    staged_shards,
    write_run_record,
)
from vitray.errors import JobError, SourceError
from vitray.schema import VectorColumn
from vitray.storage import join


def test_vectors_are_split_by_bytes_and_have_no_dictionary(local_out: str) -> None:
    vectors = [VECTOR, VectorColumn("embedding_h", D, 1, "mean", False, "float16")]
    dataset = resolve_dataset(job_for(local_out), FACTS, vectors, pa.schema([]), NOW)
    shard = input_shard(local_out)
    commit(dataset, shard, 9)
    group = pq.read_metadata(dataset.data_url(shard.id)).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {c.compression for c in columns.values()} == {"ZSTD"}
    for name in ("embedding.list.element", "embedding_h.list.element"):
        assert (
            "BYTE_STREAM_SPLIT" in columns[name].encodings and not columns[name].has_dictionary_page
        )
    assert columns["label"].has_dictionary_page
    names = list(columns)
    assert max(names.index(n) for n in names if "embedding" not in n) < min(
        names.index(n) for n in names if "embedding" in n
    )


def test_duckdb_pandas_and_pyarrow_read_the_data(local_out: str) -> None:
    dataset = make(local_out)
    commit(dataset, input_shard(local_out, "a"), 7, {2: "empty"})
    commit(dataset, input_shard(local_out, "b"), 5)
    commit(dataset, input_shard(local_out, "c"), 0)
    files = f"{local_out}/data/*.parquet"
    query = vector(100)
    good = [0, 1, 3, 4, 5, 6, 0, 1, 2, 3, 4]
    cosines = [
        float(vector(i) @ query / np.linalg.norm(vector(i)) / np.linalg.norm(query)) for i in good
    ]
    numbers = [float(x) for x in query]
    as_list = duckdb.execute(
        f"select index, list_cosine_similarity(embedding, $1) from '{files}' order by shard, index",
        [numbers],
    )
    rows = as_list.fetchall()
    assert [row[0] for row in rows] == good and np.allclose(
        [row[1] for row in rows], cosines, atol=1e-6
    )
    as_array = (
        f"select array_cosine_similarity(embedding::float[{D}], $1::float[{D}]) from '{files}' "
        f"order by shard, index"
    )
    assert np.allclose(
        [row[0] for row in duckdb.execute(as_array, [numbers]).fetchall()], cosines, atol=1e-6
    )
    frame = pd.concat([pd.read_parquet(path) for path in data_files(local_out)])
    assert frame["index"].tolist() == good and np.array_equal(
        np.stack(frame["embedding"]), np.stack([vector(i) for i in good])
    )
    import pyarrow.dataset as pads

    schema = pads.dataset(join(local_out, "data"), format="parquet").schema
    assert schema.field("embedding").type == pa.list_(
        pa.field("element", pa.float32(), nullable=False), D
    )
    assert schema.field("content_hash").type == pa.binary(16)


def test_run_records_come_back_in_order(local_out: str) -> None:
    dataset = make(local_out)
    for run in ("20260102-b", "20260101-a"):
        write_run_record(dataset, run, {"run": run, "images_per_s": 1.5})
    assert [record["run"] for record in read_run_records(local_out)] == ["20260101-a", "20260102-b"]


def test_redo_by_shard_and_by_reason(local_out: str) -> None:
    dataset = make(local_out)
    one, two, three = (input_shard(local_out, name) for name in ("one", "two", "three"))
    commit(dataset, one, 4, {0: "time_limit", 1: "empty"})
    commit(dataset, two, 4, {3: "empty"})
    commit(dataset, three, 4)
    ids = [one.id, two.id, three.id]
    finish_with(dataset, ids, ids)
    assert shards_to_redo(dataset, [], ["time_limit"]) == [one.id]
    assert shards_to_redo(dataset, [], ["empty"]) == sorted([one.id, two.id])
    assert shards_to_redo(dataset, [three.id], ["time_limit"]) == sorted([one.id, three.id])
    assert shards_to_redo(dataset, [], ["missing"]) == shards_to_redo(dataset, [], []) == []
    with pytest.raises(JobError, match=r"holds no shard nope\. Ids are"):
        shards_to_redo(dataset, ["nope"], [])
    delete_data_files(dataset, [one.id])
    assert set(committed_files(local_out)) == {two.id, three.id} and success(local_out) is None
    assert (
        names_of(local_out, "_errors/") == [f"_errors/{two.id}.parquet"]
        and names_of(local_out, "manifest-") == []
    )
    commit(dataset, one, 4)
    assert finish_with(dataset, ids, ids).errors == 1


def test_what_a_killed_plan_left_is_taken_for_nothing(local_out: str) -> None:
    """Its scratch holds whole datasets of the sample."""
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, 4)
    finish_with(dataset, [shard.id], [shard.id])
    inside = make(f"{local_out}/_vitray/probe-12ab/64/out")
    other = input_shard(inside.out, "dogs")
    commit(inside, other, 4, {0: "empty"})
    stage(inside, input_shard(inside.out, "emus"), 4)
    finish_with(inside, [other.id], [other.id])
    append_group_log(inside.out, [(0, "u")])
    write_run_record(inside, "r", {"run": "r"})
    assert (
        set(committed_files(local_out)) == {shard.id}
        and staged_shards(dataset) == []
        and read_run_records(local_out) == []
    )
    assert [row["shard"] for row in read_manifest(local_out).to_pylist()] == [
        shard.id
    ] and load_group_log(local_out) == []
    assert len(read(local_out)) == 4 and finish_with(dataset, [shard.id], [shard.id]).rows == 4
    assert {entry.name for entry in os.scandir(f"{local_out}/_vitray/probe-12ab/64/out")} == {
        "data",
        "_errors",
        "_vitray",
        "_SUCCESS.json",
    }


def test_read_gives_rows_in_the_order_of_shards_and_the_columns_asked_for(local_out: str) -> None:
    dataset = make(local_out)
    with pytest.raises(SourceError, match="no committed shard"):
        read(local_out)
    b, a = input_shard(local_out, "b"), input_shard(local_out, "a")
    commit(dataset, b, 5, {2: "empty"})
    commit(dataset, a, 6)
    ids = sorted([a.id, b.id])
    table = read(local_out, columns=["index", "shard", "format"])
    assert list(zip(table["shard"].to_pylist(), table["index"].to_pylist())) == [
        *((a.id, i) for i in range(6)), *((b.id, i) for i in (0, 1, 3, 4)),
    ]  # fmt: skip
    assert table["format"].to_pylist() == [
        ("jpeg", "png", "webp")[i % 3] for i in [0, 1, 2, 3, 4, 5, 0, 1, 3, 4]
    ]
    assert set(table.column_names) == {"index", "shard", "format"}
    finish_with(dataset, ids, ids)
    all_rows = read(local_out)
    assert all_rows.schema.equals(dataset.schema) and data_files(local_out) == [
        dataset.data_url(s) for s in ids
    ]
    assert all_rows.drop_columns(["format"]).equals(
        pa.concat_tables(
            [rows_of(dataset, a.id, range(6)), rows_of(dataset, b.id, [0, 1, 3, 4])]
        ).drop_columns(["format"])
    )
