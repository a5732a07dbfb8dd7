"""Parquet sources: row groups, the image column, passthrough columns, broken files."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.source_files import (
    IMAGES,
    image_members,
    job_for,
    kept,
    only_shard,
    pairs,
    put_raw,
    read_all,
    write_tar,
)
from vitray.dataset import base_of
from vitray.errors import JobError, ShardError
from vitray.schema import Encoded, End
from vitray.sources import estimate_images, file_passthrough_schema, list_shards, read_shard


def test_tars_parquet_files_and_manifests_whose_names_are_not_utf8_are_read(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x", image_members()).read_bytes()
    pq.write_table(pa.table({"image": list(IMAGES.values())}), tmp_path / "y")
    files = {
        b"caf\xe9.tar": tar,
        b"caf\xe9.parquet": (tmp_path / "y").read_bytes(),
        b"caf\xe9.csv": b"path\nb\\udce9.png\nno\\udce9.png\n",
    }
    for name, data in files.items():
        folder = tmp_path / os.fsdecode(name).rpartition(".")[2]
        put_raw(folder, name, data)
        put_raw(folder, b"b\xe9.png", b"b")
        job = job_for(folder, format=folder.name if folder.name != "csv" else "manifest")
        shard = only_shard(job)
        assert shard.url == f"{folder}/caf\\udce9.{folder.name}" and shard.id.isascii()
        rows, _ = read_all(shard, job)
        if folder.name == "csv":
            assert [(r.data, r.reason, r.uri) for r in rows] == [
                (b"b", None, f"{folder}/b\\udce9.png"),
                (None, "missing", f"{folder}/no\\udce9.png"),
            ]
        else:
            assert [r.data for r in rows] == list(IMAGES.values())


def test_large_files_are_split_into_whole_row_groups(tmp_path: Path) -> None:
    values = [b"%d" % n for n in range(45_000)]
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet", row_group_size=7_000)
    pq.write_table(pa.table({"image": values}), tmp_path / "b.parquet", row_group_size=45_000)
    job = job_for(tmp_path)
    *parts, one = list_shards(job, []).shards
    assert [(s.start, s.stop, s.rows) for s in parts] == [
        (0, 2, 14_000),
        (2, 4, 14_000),
        (4, 7, 17_000),
    ]
    assert [s.id.split("-")[:3] for s in parts[:2]] == [["a", "rg0", "2"], ["a", "rg2", "4"]]
    assert len({base_of(s.id) for s in parts}) == 1 and len({s.id for s in parts}) == 3
    assert (one.start, one.stop, one.rows) == (0, 0, 45_000)
    rows, end = read_all(parts[1], job, lambda index: index in (0, 13_999))
    assert pairs(rows) == [(0, "14000", b"14000"), (13_999, "27999", b"27999")] and end == End(
        14_000
    )
    assert estimate_images([*parts, one], job) == (90_000, True)


def test_null_bytes_are_rows_and_passthrough_columns_keep_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "tags": pa.array([["a"], None, [], ["b", "c"]]),
            "image": pa.array(
                [
                    {"bytes": b"1", "path": "p"},
                    {"bytes": None, "path": "../x.jpg"},
                    None,
                    {"bytes": b"", "path": ""},
                ],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "kind": pa.array(["x", "y", None, "x"]).dictionary_encode(),
            "n": pa.array([1, 2, None, 4], pa.int16()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    job = job_for(tmp_path, keep=["n", "tags", "kind"])
    shard = only_shard(job)
    rows, _ = read_all(shard, job)
    assert [(r.key, r.data, r.reason) for r in rows] == [
        ("p", b"1", None),
        ("../x.jpg", None, "path_not_allowed"),
        ("2", None, "missing"),
        ("3", b"", None),
    ]
    assert "`..` in a path is not followed" in rows[1].message
    assert [kept(r) for r in rows] == [
        (1, ["a"], "x"),
        (2, None, "y"),
        (None, [], None),
        (4, ["b", "c"], "x"),
    ]
    schema = file_passthrough_schema(shard, job)
    assert schema.names == ["n", "tags", "kind"] and schema.field("n").type == pa.int16()
    assert schema.field("kind").type == table["kind"].type
    assert (
        pa.table(
            [pa.array(c, f.type) for c, f in zip(zip(*(kept(r) for r in rows)), schema)], schema
        ).num_rows
        == 4
    )


def test_the_image_column_is_found_by_name_then_by_type_and_can_be_named(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"thumb": [b"t"], "jpg": [b"j"], "text": ["x"]}), tmp_path / "a.parquet"
    )
    for fields, want in (({}, b"j"), ({"image_column": "thumb"}, b"t")):
        job = job_for(tmp_path, **fields)
        assert pairs(read_all(only_shard(job), job)[0]) == [(0, "0", want)]
    for fields in ({"image_column": "none"}, {"key_column": "none"}, {"keep": ["none"]}):
        with pytest.raises(JobError, match="none"):
            list_shards(job_for(tmp_path, **fields), [])
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="image bytes"):
        list_shards(job_for(tmp_path), [])


def test_of_several_image_columns_one_with_a_usual_name_is_read_or_the_job_is_refused(
    tmp_path: Path,
) -> None:
    structs = [{"bytes": b"s", "path": "p"}]
    for columns, want in {
        ("hash", "content"): b"content",
        ("mask", "IMG"): b"IMG",
        ("photo",): b"photo",
        ("image", "jpg"): "image, jpg",
        ("mask", "photo", "path"): b"photo",
        ("front", "back"): "front, back",
        ("mask", "image", "bytes"): "image, bytes",
    }.items():
        values = {name: ["a.jpg"] if name == "path" else [name.encode()] for name in columns}
        pq.write_table(pa.table({**values, "n": [1]}), tmp_path / "a.parquet")
        job = job_for(tmp_path)
        if isinstance(want, bytes):
            assert pairs(read_all(only_shard(job), job)[0]) == [(0, "0", want)]
            continue
        with pytest.raises(JobError, match=rf"several columns .*: {want}\. Set `image_column`\."):
            list_shards(job, [])
        named = job_for(tmp_path, image_column=columns[0])
        assert pairs(read_all(only_shard(named), named)[0]) == [(0, "0", columns[0].encode())]
    pq.write_table(pa.table({"front": structs, "back": structs}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="front, back"):
        list_shards(job_for(tmp_path), [])


def test_broken_parquet_is_one_broken_shard_and_the_listing_goes_on(tmp_path: Path) -> None:
    table = pa.table({"image": [os.urandom(4000) for _ in range(64)]})
    for name in "abc":
        pq.write_table(
            table,
            tmp_path / f"{name}.parquet",
            row_group_size=32,
            write_page_checksum=True,
            compression="none",
        )
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])  # no footer
    flipped = bytearray((tmp_path / "b.parquet").read_bytes())
    flipped[180_000] ^= 4  # in the second row group's page
    (tmp_path / "b.parquet").write_bytes(flipped)
    job = job_for(tmp_path)
    a, b, c = list_shards(job, []).shards
    assert [s.rows for s in (a, b, c)] == [None, 64, 64]
    with pytest.raises(ShardError, match=r"a\.parquet"):
        read_all(a, job)
    stream, got = read_shard(b, job, lambda index: True), []
    with pytest.raises(ShardError, match=r"b\.parquet"):
        got.extend(stream)
    assert [row.data for row in got if isinstance(row, Encoded)] == table["image"].to_pylist()[:32]
    assert [row.data for row in read_all(c, job)[0]] == table["image"].to_pylist()
    assert estimate_images([a, b, c], job) == (128, False)


def test_a_later_file_without_the_column_is_a_broken_shard(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "text": ["t"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "b.parquet")
    job = job_for(tmp_path, keep=["text"])
    a, b = list_shards(job, []).shards
    assert kept(read_all(a, job)[0][0]) == ("t",)
    with pytest.raises(ShardError, match="text"):
        read_all(b, job)
