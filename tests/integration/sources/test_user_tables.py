"""Tables and manifests as users had them: encodings, delimiters, paths, image columns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from support.user_inputs import MODEL, fields_of, job_for, jpg, label, write_files
from vitray.errors import JobError
from vitray.operations.planning import plan


def test_paths_beat_thumbnails_and_other_pairs_are_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    thumbnail = jpg(2, "PNG")
    pq.write_table(
        pa.table({"image_path": ["a.jpg"], "thumbnail": [thumbnail]}), folder / "list.parquet"
    )
    labelled = label(folder / "list.parquet", tmp_path / "out")
    assert [(row["key"], row["format"]) for row in labelled.rows] == [("a.jpg", "jpeg")]
    pq.write_table(
        pa.table({"image_path": ["a.jpg"], "blob": [thumbnail]}), folder / "list.parquet"
    )
    with pytest.raises(
        JobError, match=r"images in `blob` and paths in `image_path`\. Set `image_column`"
    ):
        vitray.run(job_for(folder / "list.parquet", tmp_path / "out2"))
    chosen = label(folder / "list.parquet", tmp_path / "out3", image_column="blob")
    assert [row["format"] for row in chosen.rows] == ["png"]


def test_nested_columns_name_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [jpg(1)], "m": [{"a": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(JobError, match="key_column: `m` is struct<a: int64>"):
        vitray.run(job_for(tmp_path / "a.parquet", tmp_path / "out", key_column="m"))


def test_the_first_image_of_a_list_is_the_first_that_is_there(tmp_path: Path) -> None:
    images = pa.array([[None, jpg(1)], [jpg(2), None, jpg(3)], [], None], pa.list_(pa.binary()))
    pq.write_table(pa.table({"images": images}), tmp_path / "a.parquet")
    labelled = label(tmp_path / "a.parquet", tmp_path / "out")
    assert (labelled.result.rows, labelled.result.errors, labelled.result.left_out) == (
        2,
        2,
        {"further_image": 1},
    )


def test_images_in_further_columns_are_counted(tmp_path: Path) -> None:
    columns = {
        "image": [jpg(1), jpg(2), jpg(3)],
        "mask": [jpg(4), None, jpg(5)],
        "hash": [b"x", b"y", b"z"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    labelled = label(tmp_path / "a.parquet", tmp_path / "out")
    assert labelled.result.rows == 3 and labelled.result.left_out == {"further_image": 2}


def test_a_field_of_megabytes_costs_no_row(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": jpg(2)})
    long = "x" * 3_000_000
    (folder / "list.csv").write_text(f"path,text\na.jpg,{long}\nb.jpg,short\n")
    labelled = label(folder / "list.csv", tmp_path / "out", keep="text")
    assert [row["text"] for row in labelled.rows] == [long, "short"]


def test_limit_and_sample_report_how_many_images_they_choose(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "in", {f"{n:02d}.jpg": jpg(n) for n in range(12)})
    argv = [
        "run",
        folder,
        "--model",
        MODEL,
        *fields_of(limit=2, group_size=4),
        "--out",
        tmp_path / "out",
    ]
    code, out, _ = cli(*argv)
    assert (
        code == 0
        and caplog.messages[0] == "limit chooses whole shards: 2 of 3 file shards, 8 of 12 images"
    )
    assert "excluded   1 shard with 4 images, by since, sample or limit" in out.splitlines()
    code, out, _ = cli(*argv, "--json")
    document = json.loads(out)
    assert (document["rows"], document["shards_not_selected"], document["images_not_selected"]) == (
        8,
        1,
        4,
    )
    for refuse in (vitray.run, plan):
        with pytest.raises(JobError, match=r"sample: 0\.001 of 3 shards is none"):
            refuse(job_for(folder, tmp_path / "none", sample=0.001, group_size=4))


def test_categories_lists_and_paths_in_structs_are_read(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": jpg(2)})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    tables = {
        "paths.parquet": pa.table(
            {"path": pa.array(["a.jpg", "b.jpg", "a.jpg"]).dictionary_encode()}
        ),
        "bytes.parquet": pa.table(
            {"image": pa.array([jpg(1), jpg(1), jpg(2)]).dictionary_encode()}
        ),
        "lists.parquet": pa.table(
            {
                "images": pa.array(
                    [[{"bytes": jpg(n), "path": None}] * 2 for n in (1, 2, 3)], pa.list_(image)
                )
            }
        ),
        "structs.parquet": pa.table(
            {"image": pa.array([{"bytes": None, "path": f"{n}.jpg"} for n in "aba"], image)}
        ),
        "alone.parquet": pa.table(
            {
                "image": pa.array(
                    [{"path": f"{n}.jpg"} for n in "aba"], pa.struct([("path", pa.string())])
                )
            }
        ),
        "blobs.parquet": pa.table(
            {
                "image": pa.array(
                    [[jpg(1)], [jpg(2), jpg(3)], [jpg(4)]], pa.large_list(pa.large_binary())
                )
            }
        ),
    }
    further = {"lists.parquet": 3, "blobs.parquet": 1}
    for name, table in tables.items():
        pq.write_table(table, folder / name)
        labelled = label(folder / name, tmp_path / f"out-{name}")
        assert (labelled.result.rows, labelled.result.errors) == (3, 0), name
        assert labelled.result.left_out.get("further_image", 0) == further.get(name, 0)


def test_paths_in_structs_do_not_lead_out(tmp_path: Path) -> None:
    write_files(tmp_path, {"in/a.jpg": jpg(1), "secret/b.jpg": jpg(2)})
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["a.jpg", "../secret/b.jpg", f"{tmp_path}/secret/b.jpg", "gone.jpg"]
    rows = pa.array([{"bytes": None, "path": path} for path in paths], image)
    pq.write_table(pa.table({"image": rows}), tmp_path / "in" / "a.parquet")
    labelled = label(tmp_path / "in" / "a.parquet", tmp_path / "out")
    assert labelled.names == ["a.jpg"]
    assert [row["reason"] for row in labelled.errors] == [
        "path_not_allowed",
        "path_not_allowed",
        "missing",
    ]


@pytest.mark.parametrize(
    ("delimiter", "name"),
    [(";", "list.csv"), ("\t", "list.csv"), ("\t", "list.tsv"), ("|", "list.csv")],
)
def test_other_delimiters_are_recognised(tmp_path: Path, delimiter: str, name: str) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": jpg(2)})
    lines = [["label", "path"], ["a, or b", "a.jpg"], ["x", "b.jpg"]]
    (folder / name).write_text("\n".join(delimiter.join(line) for line in lines))
    labelled = label(folder / name, tmp_path / "out", keep="label")
    assert [(row["key"], row["input_label"]) for row in labelled.rows] == [
        ("a.jpg", "a, or b"),
        ("b.jpg", "x"),
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-16-be"])
def test_other_encodings_are_named(
    tmp_path: Path, encoding: str, cli: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.jpg,x\n", encoding=encoding)
    code, _, err = cli("run", tmp_path / "list.csv", "--model", MODEL, "--out", tmp_path / "out")
    assert code == 2 and encoding[:6].upper() in err and "iconv" in err


def test_backslashes_mean_slashes_where_no_such_file_is(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"img/a.jpg": jpg(1), "odd\\name.jpg": jpg(2)})
    lines = [
        "path",
        "img\\a.jpg",
        ".\\img\\a.jpg",
        "odd\\name.jpg",
        "..\\x.jpg",
        "https://example.org/a.jpg",
    ]
    (folder / "list.csv").write_text("\n".join(lines))
    labelled = label(folder / "list.csv", tmp_path / "out")
    assert labelled.keys == lines[1:4]
    assert [row["reason"] for row in labelled.errors] == ["missing", "path_not_allowed"]
    assert "is not followed: vitray reads local paths and s3://" in labelled.errors[1]["message"]


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        ("path,text\nhérisson.jpg,café\n", "cp1252"),
        ("path,text\rhérisson.jpg,café\r", "utf-8"),
        ("sep=;\npath;text\nhérisson.jpg;café\n", "utf-8"),
        ("path, text\nhérisson.jpg, café\n", "utf-8"),
        ("path,text\nhe\u0301risson.jpg,café\n", "utf-8"),
        ("path,text\nh%C3%A9risson.jpg,café\n", "utf-8"),
    ],
    ids=["cp1252", "carriage returns", "sep line", "spaces", "decomposed", "percent"],
)
def test_a_csv_is_read_however_it_was_saved(tmp_path: Path, body: str, encoding: str) -> None:
    folder = write_files(tmp_path / "in", {"hérisson.jpg": jpg(1)})
    (folder / "list.csv").write_bytes(body.encode(encoding))
    labelled = label(folder / "list.csv", tmp_path / "out", keep="text")
    assert [row["text"] for row in labelled.rows] == ["café"] and labelled.result.errors == 0
    notes = ["lines that are not UTF-8 were read as Windows-1252"] if encoding == "cp1252" else []
    assert list(labelled.result.notes.values()) == notes


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        (
            "list.jsonl",
            '[{"path": "a.jpg"}, {"path": "b.jpg"}]',
            "is one JSON document, not JSON lines",
        ),
        ("list.jsonl", '{\n "path": "a.jpg"\n}\n', "is one JSON document, not JSON lines"),
        ("list.csv", "img/a.jpg\nimg/b.jpg\n", "has no header: its first line is img/a.jpg"),
    ],
)
def test_a_manifest_of_another_form_is_refused_by_name(
    tmp_path: Path, name: str, body: str, says: str
) -> None:
    (tmp_path / name).write_text(body)
    with pytest.raises(JobError, match=says):
        vitray.run(job_for(tmp_path / name, tmp_path / "out"))


def test_folders_are_columns(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"label=cat/y=1/a.jpg": jpg(1), "label=big%20dog/b.jpg": jpg(2)})
    labelled = label(tmp_path / "in", tmp_path / "out", keep="label,folder,y")
    values = {
        row["key"].rpartition("/")[2]: (row["input_label"], row["folder"], row["y"])
        for row in labelled.rows
    }
    assert values == {"a.jpg": ("cat", "y=1", "1"), "b.jpg": ("big dog", "label=big%20dog", None)}
    single = label(tmp_path / "in", tmp_path / "single", keep="y", group_size=1)
    assert [row["y"] for row in single.rows] == [None, "1"], (
        "a group without that folder is not set aside"
    )
    with pytest.raises(JobError, match="`folder` keeps the name of each file's folder"):
        vitray.run(job_for(tmp_path / "in", tmp_path / "out2", keep="caption"))


def test_a_manifest_keeps_the_folders_of_its_images(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"cat/a.jpg": jpg(1), "dog/b.jpg": jpg(2)})
    (folder / "list.csv").write_text("path,n\ncat/a.jpg,1\ndog/b.jpg,2\nnot,a,row\n")
    labelled = label(folder / "list.csv", tmp_path / "out", keep="n,folder")
    assert [(row["n"], row["folder"]) for row in labelled.rows] == [("1", "cat"), ("2", "dog")]


@pytest.mark.parametrize(
    "values",
    [[1, 1, 2], [1, None, 2], [0.5, 1.5, 2.5], [b"a", b"b", b"c"], [[1], [2], [3]]],
    ids=["twice", "null", "float", "bytes", "lists"],
)
def test_other_columns_name_no_rows(tmp_path: Path, values: list[object]) -> None:
    pq.write_table(
        pa.table({"id": values, "image": [jpg(n) for n in range(3)]}), tmp_path / "a.parquet"
    )
    assert label(tmp_path / "a.parquet", tmp_path / "out").keys == ["0", "1", "2"]


def test_images_with_paths_keep_them_as_keys(tmp_path: Path) -> None:
    images = [{"bytes": jpg(n), "path": f"{n}.jpg"} for n in range(2)]
    pq.write_table(pa.table({"id": [5, 6], "image": images}), tmp_path / "a.parquet")
    assert label(tmp_path / "a.parquet", tmp_path / "out").keys == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_two_columns_of_one_name_are_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / "in" / f"a.{form}"
    path.parent.mkdir()
    if form == "csv":
        path.write_text("path,path\na.jpg,b.jpg\n")
    else:
        pq.write_table(pa.table([pa.array([jpg(0)]), pa.array([jpg(1)])], ["image", "image"]), path)
    doubled = "path" if form == "csv" else "image"
    with pytest.raises(JobError, match=f"several columns of one name: `{doubled}`. Rename them"):
        vitray.run(job_for(path, tmp_path / "out"))
