"""Which shards a source has, under which names, whatever its format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.source_files import (
    IMAGES,
    expected,
    image_members,
    job_for,
    only_shard,
    pairs,
    read_all,
    read_tar,
    write_tar,
)
from vitray.dataset import base_of
from vitray.errors import ObjectChanged, SourceError
from vitray.schema import End
from vitray.sources import list_shards


def test_the_same_images_come_with_the_same_bytes_from_every_format(tmp_path: Path) -> None:
    for folder in ("t", "p", "h", "f"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "t/a.tar", image_members())
    names, data = list(IMAGES), list(IMAGES.values())
    pq.write_table(
        pa.table({"id": names, "image": data}), tmp_path / "p/a.parquet", row_group_size=3
    )
    structs = [{"bytes": d, "path": f"{n}.jpg"} for n, d in IMAGES.items()]
    pq.write_table(pa.table({"image": structs, "label": range(7)}), tmp_path / "h/a.parquet")
    for key, value in IMAGES.items():
        (tmp_path / f"f/{key}.JPG").write_bytes(value)
    (tmp_path / "f.csv").write_text("id,path\n" + "".join(f"{n},f/{n}.JPG\n" for n in names))
    (tmp_path / "f.jsonl").write_text(
        "\n".join(json.dumps({"id": n, "path": f"f/{n}.JPG"}) for n in names)
    )
    pq.write_table(
        pa.table({"id": names, "path": [f"f/{n}.JPG" for n in names]}), tmp_path / "f.parquet"
    )
    want = expected(IMAGES)
    kinds = {
        "t": ("tar", {}),
        "p": ("parquet", {"key_column": "id"}),
        "f.csv": ("manifest", {"key_column": "id"}),
        "f.jsonl": ("manifest", {"key_column": "id"}),
        "f.parquet": ("manifest", {"key_column": "id"}),
    }
    for source, (kind, fields) in kinds.items():
        job = job_for(tmp_path / source, **fields)
        shard = only_shard(job)
        rows, end = read_all(shard, job)
        assert (shard.kind, pairs(rows), end) == (kind, want, End(7)), source
        assert shard.rows == (None if kind == "tar" else 7)
    job = job_for(tmp_path / "f")
    rows, end = read_all(only_shard(job), job)
    urls = [str(tmp_path / f"f/{n}.JPG") for n in names]
    assert ([r.key for r in rows], [r.uri for r in rows], [r.data for r in rows], end) == (
        urls,
        urls,
        data,
        End(7),
    )
    job = job_for(tmp_path / "h")
    rows, _ = read_all(only_shard(job), job)
    assert pairs(rows) == [
        (n, f"{key}.jpg", value) for n, (key, value) in enumerate(IMAGES.items())
    ]


@pytest.mark.parametrize("kind", ["tar", "parquet", "files", "csv", "jsonl"])
def test_unwanted_rows_are_not_yielded_and_the_total_counts_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "i").mkdir()
    for key, value in IMAGES.items():
        (tmp_path / f"i/{key}.jpg").write_bytes(value)
    if kind == "tar":
        write_tar(tmp_path / "a.tar", image_members())
    if kind == "parquet":
        pq.write_table(
            pa.table({"image": list(IMAGES.values())}), tmp_path / "a.parquet", row_group_size=2
        )
    (tmp_path / "a.csv").write_text("path\n" + "".join(f"i/{n}.jpg\n" for n in IMAGES))
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"path": f"i/{n}.jpg"}) + "\n" for n in IMAGES)
    )
    job = job_for(tmp_path / ("i" if kind == "files" else f"a.{kind}"))
    rows, end = read_all(only_shard(job), job, lambda index: index in (1, 4, 5))
    values = list(IMAGES.values())
    assert [(r.index, r.data) for r in rows] == [(n, values[n]) for n in (1, 4, 5)]
    assert end == End(7)


def test_lists_globs_ranges_and_prefixes_name_the_same_shards_once(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for n in range(3):
        write_tar(tmp_path / f"s/cats-{n:02d}.tar", [(f"{n}.jpg", b"x")])
    (tmp_path / "s/notes.txt").write_text("ignored")
    base = [s.id for s in list_shards(job_for(tmp_path / "s"), []).shards]
    assert [i.rsplit("-", 2)[0] for i in base] == ["cats_00", "cats_01", "cats_02"]
    for source in (
        ["s/*.tar"],
        ["s/cats-{00..02}.tar"],
        ["s/cats-00.tar", "s/cats-{01,02}.tar", "s"],
    ):
        assert [
            s.id for s in list_shards(job_for(*(tmp_path / p for p in source)), []).shards
        ] == base
    backwards = job_for(tmp_path / "s/cats-02.tar", tmp_path / "s")
    assert [s.id for s in list_shards(backwards, []).shards] == [base[2], base[0], base[1]]


def test_a_changed_input_keeps_its_base_and_an_equal_name_elsewhere_has_another(
    tmp_path: Path,
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "x.tar", [("1.jpg", b"x")])
    first = only_shard(job_for(tmp_path / "a"))
    other = only_shard(job_for(tmp_path / "b"))
    write_tar(tmp_path / "a/x.tar", [("1.jpg", b"x"), ("2.jpg", b"y" * 20_000)])
    second = only_shard(job_for(tmp_path / "a"))
    assert base_of(first.id) == base_of(second.id) != base_of(other.id)
    assert first.id != second.id
    with pytest.raises(ObjectChanged):
        read_all(first, job_for(tmp_path / "a"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.tar.gz", "compressed tars"),
        ("a.tgz", "compressed tars"),
        ("a.txt", "holds no tar"),
        (None, "names no object"),
    ],
)
def test_a_source_without_images_says_what_it_holds(
    tmp_path: Path, name: str | None, says: str
) -> None:
    if name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=says):
        list_shards(job_for(tmp_path), [])
    with pytest.raises(SourceError, match="does not exist"):
        list_shards(job_for(tmp_path / "nothing.tar"), [])


def test_a_source_that_is_not_there_is_one_sentence_and_the_next_step(tmp_path: Path) -> None:
    write_tar(tmp_path / "a-0.tar", [])
    step = "Correct `source`, or put the images there."
    for pattern, says in {
        "*.parquet": f"source {tmp_path}/*.parquet names no object. {step}",
        "none": f"source {tmp_path}/none does not exist. {step}",
        "a-{0..1}.tar": f"source {tmp_path}/a-1.tar does not exist. {step}",
    }.items():
        with pytest.raises(SourceError) as error:
            list_shards(job_for(tmp_path / pattern), [])
        assert str(error.value) == says


def test_a_single_object_is_taken_whatever_its_suffix_when_format_is_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "archive", image_members())
    with pytest.raises(SourceError, match="without suffix"):
        list_shards(job_for(tmp_path / "archive"), [])
    assert pairs(read_tar(tmp_path / "archive")[0]) == expected(IMAGES)


def test_paths_outside_the_allowed_prefixes_are_never_read(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "data2"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(b"secret")
    (folder / "in.jpg").write_bytes(b"in")
    (folder / "link.jpg").symlink_to(outside / "secret.jpg")
    (folder / "dir").symlink_to(outside)
    (folder / "inner.jpg").symlink_to(folder / "in.jpg")
    os.mkfifo(folder / "pipe.jpg")
    refused = [
        "../data2/secret.jpg",
        "x/../../data2/secret.jpg",
        str(outside / "secret.jpg"),
        f"file://{outside}/secret.jpg",
        "link.jpg",
        "dir/secret.jpg",
        "http://169.254.169.254/latest",
        "HTTPS://example.org/a.jpg",
        "s3://other/a.jpg",
        "gs://other/a.jpg",
        "/etc/passwd",
        ".",
        "a\0b.jpg",
        f"{folder}/../data2/secret.jpg",
    ]
    fine = ["in.jpg", "./in.jpg", str(folder / "in.jpg"), f"file://{folder}/in.jpg", "inner.jpg"]
    gone = ["none.jpg", "pipe.jpg", "", "n" * 3000]
    lines = [json.dumps({"path": p}) for p in [*refused, *fine, *gone, None, "\ud800.jpg"]]
    (folder / "m.jsonl").write_text("\n".join(lines))
    job = job_for(folder / "m.jsonl")
    rows, end = read_all(only_shard(job), job)
    n, m = len(refused), len(refused) + len(fine)
    assert [(r.key, r.reason, r.data) for r in rows[:n]] == [
        (p, "path_not_allowed", None) for p in refused
    ]
    assert [(r.key, r.data) for r in rows[n:m]] == [(p, b"in") for p in fine]
    assert [r.reason for r in rows[m:]] == ["missing"] * (len(gone) + 1) + ["missing"]
    assert [r.index for r in rows] == list(range(end.total)) and all(r.key.encode() for r in rows)
    wider = job_for(folder / "m.jsonl", allow=[str(outside)])
    rows, _ = read_all(only_shard(wider), wider)
    by_key = {r.key: r for r in rows}
    assert (
        by_key[str(outside / "secret.jpg")].data == b"secret"
        and by_key["in.jpg"].reason == "path_not_allowed"
    )
    assert by_key["../data2/secret.jpg"].reason == "path_not_allowed"
