"""Manifests in CSV, JSON lines and Parquet, and the lines that are wrong in them."""

from __future__ import annotations

import bz2
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.source_files import (
    IMAGES,
    job_for,
    kept,
    only_shard,
    put_raw,
    read_all,
    write_csv,
    write_tar,
)
from vitray.errors import JobError, ShardError, SourceError
from vitray.schema import Encoded, End
from vitray.sources import file_passthrough_schema, list_shards


def test_an_escape_in_a_manifest_leads_no_further_than_a_link(tmp_path: Path) -> None:
    """The name with the byte is checked and opened, not the name that is spelt like its escape."""
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    folder = tmp_path / "in"
    put_raw(folder, rb"a\udce9.jpg", b"spelt like it")
    Path(os.fsdecode(os.fsencode(folder) + b"/a\xe9.jpg")).symlink_to(tmp_path / "secret.jpg")
    job = job_for(write_csv(folder / "m.csv", [["path"], [r"a\udce9.jpg"], [r"a\udc5cudce9.jpg"]]))
    assert [(r.data, r.reason) for r in read_all(only_shard(job), job)[0]] == [
        (None, "path_not_allowed"),
        (b"spelt like it", None),
    ]


def test_an_image_of_a_manifest_that_cannot_be_read_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    os.mkdir(tmp_path / "proc")
    (tmp_path / "m.jsonl").write_text(
        "\n".join(json.dumps({"path": p}) for p in ["a.jpg", "/proc/sys/vm/drop_caches", "a.jpg"])
    )
    job = job_for(tmp_path / "m.jsonl", allow=[str(tmp_path), "/proc/sys/vm"])
    rows, _ = read_all(only_shard(job), job)
    assert [(row.data, row.reason) for row in rows] == [
        (b"a", None),
        (None, "missing"),
        (b"a", None),
    ]


def test_csv_columns_are_text_and_quotes_hold_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    body = [
        ["\ufefffile_name", "caption", "n"],
        ["a.jpg", 'two\nlines, "quoted"', "007"],
        ["b.jpg", "", "x"],
    ]
    job = job_for(write_csv(tmp_path / "m.csv", body), keep=["n", "caption"])
    shard = only_shard(job)
    rows, end = read_all(shard, job)
    assert [(r.key, r.data, r.reason, kept(r)) for r in rows] == [
        ("a.jpg", b"a", None, ("007", 'two\nlines, "quoted"')),
        ("b.jpg", None, "missing", ("x", "")),
    ]
    assert end == End(2) and shard.rows == 2
    assert file_passthrough_schema(shard, job) == pa.schema(
        [("n", pa.string()), ("caption", pa.string())]
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_ranges_of_a_manifest_tile_its_rows(tmp_path: Path, suffix: str) -> None:
    names = [f"{key}.jpg" for key in IMAGES]
    for key, data in IMAGES.items():
        (tmp_path / f"{key}.jpg").write_bytes(data)
    path = tmp_path / f"m.{suffix}"
    if suffix == "csv":
        write_csv(path, [["path"], *[[n] for n in names]])
    elif suffix == "jsonl":
        path.write_text(
            "\n\n".join(json.dumps({"path": n, "extra": {"b": 1, "a": [n]}}) for n in names)
        )
    else:
        pq.write_table(pa.table({"path": names}), path, row_group_size=2)
    job = job_for(path, group_size=3)
    shards = list_shards(job, []).shards
    assert [(s.start, s.stop, s.rows) for s in shards] == [(0, 3, 3), (3, 6, 3), (6, 7, 1)]
    assert [s.id.split("-")[1:3] for s in shards] == [
        ["rows0", "3"],
        ["rows3", "6"],
        ["rows6", "7"],
    ]
    got = [(r.key, r.data) for s in shards for r in read_all(s, job)[0]]
    assert got == [(f"{key}.jpg", data) for key, data in IMAGES.items()]
    assert [read_all(s, job)[1] for s in shards] == [End(3), End(3), End(1)]


def said(rows: list[Encoded]) -> list[tuple[str, bytes | None, str]]:
    return [(row.key, row.data, row.message) for row in rows]


def test_a_bad_line_costs_its_own_row_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    lines = [
        '{"path": "a.jpg", "meta": {"b": 1, "a": null}}',
        '{"path": "a.jpg"}',
        "",
        '{"path": ',
        '{"path": "a.jpg"}',
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    job = job_for(tmp_path / "m.jsonl", group_size=2, keep=["meta"])
    first, second = list_shards(job, []).shards
    assert [kept(r) for r in read_all(first, job)[0]] == [('{"a": null, "b": 1}',), (None,)]
    rows, end = read_all(second, job)
    assert said(rows) == [
        ("2", None, "line 4 is not a JSON object"),
        ("a.jpg", b"a", ""),
    ] and end == End(2)
    assert (rows[0].index, rows[0].uri, rows[0].reason, kept(rows[0])) == (
        0,
        f"{tmp_path}/m.jsonl",
        "missing",
        (None,),
    )


@pytest.mark.parametrize(
    "line",
    [b"[1]", b'{"path": "a.jpg"', b"[" * 100_000, b'{"path": "\xff.jpg"}', b"{} {}", b"nothing"],
)
def test_every_bad_line_gets_the_same_message(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "a.jpg"}\n' + line + b"\n")
    job = job_for(tmp_path / "m.jsonl")
    rows, _ = read_all(only_shard(job), job)
    assert (rows[1].key, rows[1].reason, rows[1].message) == (
        "1",
        "missing",
        "line 2 is not a JSON object",
    )


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        (["a.jpg,1", "a.jpg", "a.jpg,2"], {1: "line 3 is not valid CSV (1 fields, the header "
            "has 2)"}),
        (["a.jpg,1", 'a.jpg,"5" '
            'disc"', "a.jpg,2"], {1: "line 3 is not valid CSV (',' expected after '\"')"}),
        (["a.jpg,1", 'a.jpg,"open', "a.jpg,2", 'a.jpg,"x"'], {1: "line 3 is not valid CSV (',' "
            "expected "
            "after "
            "'\"')"}),
        (["a.jpg,1", 'a.jpg,"open', "a.jpg,2", "", "a.jpg,3"], {1: "line 3 is not valid CSV "
            "(unexpected "
            "end of "
            "data)"}),
        (["a.jpg,1", 'a.jpg,"open'] + ["a.jpg,2"] * 17_000, {1: "line 3 is not valid CSV "
            "(unexpected "
            "end of "
            "data)"}),
        (['a.jpg,"two\nlines"', "a.jpg,1,2", "a.jpg,2"], {1: "line 4 is not valid CSV (3 fields, "
            "the "
            "header "
            "has 2)"}),
        (['"', "a.jpg,1", '"'], {0: "line 2 is not valid CSV (1 fields, the header "
            "has 2)", 2: "line 4 is not valid CSV (unexpected end of data)"}),
    ],
)  # fmt: skip
def test_a_line_of_a_csv_that_is_none_costs_its_own_row_and_none_that_it_took_along(
    tmp_path: Path, lines: list[str], bad: dict[int, str]
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "m.csv").write_text("path,n\n" + "\n".join(lines))
    images = sum(line != "" for line in lines)
    for group_size in [100_000] + [2] * (images < 100):
        job = job_for(tmp_path / "m.csv", group_size=group_size)
        got = [
            row for shard in list_shards(job, []).shards for row in said(read_all(shard, job)[0])
        ]
        assert got == [
            ("a.jpg", b"a", "") if n not in bad else (str(n), None, bad[n]) for n in range(images)
        ]


def test_a_csv_whose_every_line_takes_the_rest_along_is_broken_soon(tmp_path: Path) -> None:
    """Each line, looked at again, would take along all that follow it: 5,000 times 5,000 lines."""
    (tmp_path / "m.csv").write_text("path,n,m\n" + 'x","\n' * 5_000)
    job = job_for(tmp_path / "m.csv")
    with pytest.raises(
        ShardError, match=r"m\.csv: line \d+ is not valid CSV .* Correct or remove the line\."
    ):
        read_all(only_shard(job), job)


def test_a_header_that_is_no_csv_is_a_broken_shard(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('path,"n" x\na.jpg,1\n')
    with pytest.raises(ShardError, match="line 1 is not valid CSV"):
        read_all(only_shard(job_for(tmp_path / "m.csv")), job_for(tmp_path / "m.csv"))


def test_what_is_not_text_is_refused_as_a_manifest_in_plain_words(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"\xff\n\xfe,\n" * 99)])
    (tmp_path / "b.bz2").write_bytes(bz2.compress(os.urandom(900)))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "d.csv").write_bytes(b"path\n\0\1")
    for name in ("a.tar", "b.bz2", "c.png"):
        with pytest.raises(SourceError) as error:
            list_shards(job_for(tmp_path / name, format="manifest"), [])
        says = (
            "is not a manifest (Parquet, CSV or JSONL): its bytes are not UTF-8 text. Correct "
            "`source` or `format`, or replace it."
        )
        assert str(error.value) == f"{tmp_path / name} {says}"
    (tmp_path / "good.csv").write_text("path\na.jpg\n")
    job = job_for(tmp_path, format="manifest")
    broken, good = list_shards(job, []).shards
    assert read_all(good, job)[1] == End(1), "a manifest by its name is one broken shard"
    with pytest.raises(
        ShardError, match=r"d\.csv is not a manifest \(Parquet, CSV or JSONL\): .* or replace it"
    ):
        read_all(broken, job)


def test_a_manifest_without_a_path_column_is_a_bad_job(tmp_path: Path) -> None:
    job = job_for(write_csv(tmp_path / "m.csv", [["who", "what"], ["a", "b"]]))
    with pytest.raises(JobError, match="image_column"):
        list_shards(job, [])
    named = job_for(tmp_path / "m.csv", image_column="what")
    assert [r.reason for r in read_all(only_shard(named), named)[0]] == ["missing"]
    (tmp_path / "m.csv").write_text("path\n")
    job = job_for(tmp_path / "m.csv")
    assert read_all(only_shard(job), job) == ([], End(0))
