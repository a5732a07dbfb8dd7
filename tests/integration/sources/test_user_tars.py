"""Tars as users had them: dots in names, sidecar files, several images in a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from support.user_inputs import DOTTED, MODEL, fields_of, job_for, jpg, label, rows_below, write_tar
from vitray.errors import SourceError
from vitray.operations.planning import plan, status
from vitray.operations.validation import validate
from vitray.sources.tar import dotted_extensions


def test_dots_in_member_names_cost_no_image(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "in" / "a.tar", {name: jpg(n) for n, name in enumerate(DOTTED)})
    labelled = label(source, tmp_path / "out")
    assert labelled.keys == [name.removesuffix(".jpg") for name in DOTTED]
    assert (labelled.result.exit_code, labelled.result.errors, labelled.result.left_out) == (
        0,
        0,
        {},
    )


@pytest.mark.parametrize("first", ["json", "jpg"])
def test_sidecars_of_dotted_names_belong_to_their_image(tmp_path: Path, first: str) -> None:
    members = dict[str, bytes]()
    for n, name in enumerate(DOTTED):
        stem = name.removesuffix(".jpg")
        pair = {f"{stem}.jpg": jpg(n), f"{stem}.json": json.dumps({"n": n}).encode()}
        members |= pair if first == "jpg" else dict(reversed(pair.items()))
    labelled = label(write_tar(tmp_path / "in" / "a.tar", members), tmp_path / "out", keep="json")
    assert [(row["key"], row["json"]) for row in labelled.rows] == [
        (name.removesuffix(".jpg"), json.dumps({"n": n})) for n, name in enumerate(DOTTED)
    ]
    assert labelled.result.errors == 0


@pytest.mark.parametrize(
    "members",
    [
        [
            "john.doe.jpg",
            "john.doe.txt",
            "john.smith.jpg",
            "john.smith.txt",
            "mary.jones.jpg",
            "mary.jones.txt",
            "li.wei.jpg",
            "li.wei.txt",
        ],
        [
            "a.jpg",
            "a.txt",
            "anna.jpg",
            "anna.txt",
            "anna.maria.jpg",
            "anna.maria.txt",
            "b.jpg",
            "b.txt",
        ],
        ["2024.01.txt", "2024.01.jpg", "2024.02.txt", "2024.03.txt", "2024.03.jpg"],
        ["0.a.txt", "0.jpg", "0.txt", "1.jpg", "1.txt", "1.a.txt"],
        [
            "clip.txt",
            "clip.jpg",
            "clip.0001.txt",
            "clip.0001.jpg",
            "clip.0002.txt",
            "clip.0002.jpg",
        ],
        ["anna.jpg", "anna.txt", "anna.maria.txt", "anna.maria.jpg", "b.jpg", "b.txt"],
        ["Mr. A.jpg", "Mr. A.txt", "Mr. A.clip.json", "Mr. B.jpg", "Mr. B.txt", "Mr. B.jpg.json"],
    ],
    ids=["names", "longer names", "dates", "words", "frames", "name in front", "compound sidecars"],
)
def test_every_image_of_a_tar_gets_its_own_sidecar(tmp_path: Path, members: list[str]) -> None:
    data = {
        name: jpg(n) if name.endswith("jpg") else name.removesuffix(".txt").encode()
        for n, name in enumerate(members)
    }
    labelled = label(write_tar(tmp_path / "in" / "a.tar", data), tmp_path / "out", keep="txt")
    images = [name.removesuffix(".jpg") for name in members if name.endswith("jpg")]
    assert [(row["key"], row["txt"]) for row in labelled.rows] == [(name, name) for name in images]
    without_image = {name for name in members if name == "2024.02.txt"}
    assert labelled.result.errors == len(without_image)


def test_a_dotted_name_behind_ordinary_ones_gets_a_row(tmp_path: Path) -> None:
    """The start of the tar, by which `auto` goes, holds no such name."""
    ordinary = {f"{n:04d}.jpg": jpg(n) for n in range(230)}
    members = {
        **ordinary,
        "shot.0001.jpg": jpg(901),
        "shot.0002.jpg": jpg(902),
        "v1.final cut.jpg": jpg(903),
    }
    labelled = label(write_tar(tmp_path / "in" / "a.tar", members), tmp_path / "out")
    assert labelled.keys[230:] == ["shot.0001", "shot.0002", "v1.final cut"]


@pytest.mark.parametrize(
    ("names", "extensions"),
    [
        (["0.jpg", "1.jpg"], []),
        (["0.depth.png", "0.jpg", "0.json"], ["depth.png"]),
        (["0.jpg", "1.jpg", "1.depth.png", "2.jpg"], []),
        (["0.jpg", "0.depth.png", "1.jpg", "1.depth.png", "2.jpg"], ["depth.png"]),
        (["0.meta.json", "0.extra.json", "0.jpg"], ["extra.json", "meta.json"]),
        (["0.left.jpg", "0.right.jpg", "1.left.jpg", "1.right.jpg"], ["left.jpg", "right.jpg"]),
        (["a.min.jpg", "b.jpg"], []),
        (["a.min.jpg", "b.min.jpg"], ["min.jpg"]),
        (["john.doe.jpg", "john.doe.txt", "mary.doe.jpg", "mary.doe.txt"], []),
        (["garden.jpg", "garden.copy.jpg", "tree.jpg"], []),
        (DOTTED, []),
        (["Dr.who.jpg", "Dr.no.jpg", "x.jpg"], []),
        (["shot.0001.png", "shot.0002.png"], []),
        (["J.K.Rowling_1.jpg", "J.R.R.Tolkien.jpg"], []),
        (["v1.2.jpg", "v1.3.jpg"], []),
        ([], []),
    ],
)
def test_member_extensions_are_distinguished_from_names_with_dots(
    names: list[str], extensions: list[str]
) -> None:
    assert sorted(dotted_extensions(names).members) == extensions


def test_where_a_key_ends_can_be_set(tmp_path: Path) -> None:
    source = write_tar(
        tmp_path / "in" / "a.tar", {"a.x.jpg": jpg(1), "a.y.jpg": jpg(2), "b.jpg": jpg(3)}
    )
    by_last = label(source, tmp_path / "last", tar_keys="last_dot")
    assert by_last.keys == ["a.x", "a.y", "b"]
    with pytest.raises(
        SourceError, match=r"sample a has several images: x\.jpg, y\.jpg\. Set `image_member`"
    ):
        vitray.run(job_for(source, tmp_path / "first", tar_keys="first_dot"))


def test_a_plain_image_is_preferred_and_the_others_are_counted(tmp_path: Path) -> None:
    depth, photo = jpg(1, "PNG"), jpg(2)
    source = write_tar(
        tmp_path / "in" / "a.tar", {"0.depth.png": depth, "0.jpg": photo, "0.json": b"{}"}
    )
    labelled = label(source, tmp_path / "out")
    assert [(row["key"], row["format"]) for row in labelled.rows] == [("0", "jpeg")]
    assert labelled.result.left_out == {"further_image": 1}
    report = status(labelled.result.out)
    assert report.image_members == {"jpg": 1} and "1 further_image" in str(report)


def test_several_plain_images_are_refused_by_run_and_plan(tmp_path: Path) -> None:
    source = write_tar(
        tmp_path / "in" / "a.tar", {"0.jpg": jpg(1), "0.png": jpg(2, "PNG"), "1.jpg": jpg(3)}
    )
    for refuse in (vitray.run, plan):
        with pytest.raises(
            SourceError, match=r"sample 0 has several images: jpg, png\. Set `image_member`"
        ):
            refuse(job_for(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    chosen = label(source, tmp_path / "chosen", image_member="png")
    assert [row["format"] for row in chosen.rows] == ["png"] and chosen.reasons == {"1": "missing"}
    assert chosen.result.left_out == {"further_image": 1}, (
        "the .jpg that `image_member` passes over"
    )


def test_passthrough_text_of_a_tar_has_no_byte_order_mark_and_a_note_when_it_is_not_utf8(
    tmp_path: Path,
) -> None:
    members = {
        "0.jpg": jpg(1),
        "0.txt": "café".encode("cp1252"),
        "1.jpg": jpg(2),
        "1.txt": b"\xef\xbb\xbfplain",
    }
    labelled = label(write_tar(tmp_path / "in" / "a.tar", members), tmp_path / "out", keep="txt")
    assert [row["txt"] for row in labelled.rows] == ["café", "plain"]
    assert list(labelled.result.notes.values()) == [
        "1 passthrough texts are not UTF-8 and were read as Windows-1252"
    ]


def test_members_that_are_not_adjacent_are_reported(tmp_path: Path) -> None:
    images = {f"{n}.jpg": jpg(n) for n in range(3)}
    source = write_tar(tmp_path / "in" / "a.tar", images | {f"{n}.json": b"{}" for n in range(3)})
    labelled = label(source, tmp_path / "out")
    assert labelled.keys == ["0", "1", "2"]
    assert (
        "key 0 came before" in labelled.errors[0]["message"]
        and "sort the tar" in labelled.errors[0]["message"]
    )
    (note,) = labelled.result.notes.values()
    assert "3 times the key of an earlier sample comes again (first: 0)" in note


def test_validate_names_a_tar_that_was_cut(tmp_path: Path) -> None:
    tar_bytes = write_tar(
        tmp_path / "whole.tar", {f"{n}.jpg": jpg(n) for n in range(4)}
    ).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes + tar_bytes)
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert len(labelled.rows) == 4 and labelled.result.exit_code == 3
    checked = validate(str(tmp_path / "out"))
    assert list(checked.truncated) == list(labelled.result.truncated) != []
    assert "cut short  a" in str(checked) and checked.ok


def test_folders_of_tables_and_tars_are_columns(tmp_path: Path) -> None:
    for n, kind in enumerate(("cat", "dog")):
        (tmp_path / "in" / f"kind={kind}").mkdir(parents=True)
        pq.write_table(
            pa.table({"image": [jpg(n)], "n": [n]}),
            tmp_path / "in" / f"kind={kind}" / "part.parquet",
        )
        write_tar(tmp_path / "tars" / f"kind={kind}" / "a.tar", {"0.jpg": jpg(n), "0.txt": b"t"})
    tables = label(tmp_path / "in", tmp_path / "out", keep="n,kind")
    assert sorted((row["n"], row["kind"]) for row in tables.rows) == [(0, "cat"), (1, "dog")]
    tars = label(tmp_path / "tars", tmp_path / "out2", keep="txt,kind,folder")
    assert sorted((row["txt"], row["kind"], row["folder"]) for row in tars.rows) == [
        ("t", "cat", "kind=cat"),
        ("t", "dog", "kind=dog"),
    ]


@pytest.mark.parametrize("name", ["key", "__key__", "id"])
def test_a_column_of_unique_values_names_the_rows(
    tmp_path: Path,
    name: str,
    cli: Callable[..., tuple[int, str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    values: list[object] = [7, 8, 9] if name == "id" else ["x", "y", "z"]
    pq.write_table(
        pa.table({name: values, "image": [jpg(n) for n in range(3)]}), tmp_path / "a.parquet"
    )
    argv = [
        "run",
        tmp_path / "a.parquet",
        "--model",
        MODEL,
        "--out",
        tmp_path / "out",
        *fields_of(),
    ]
    assert cli(*argv)[0] == 0 and f"keys come from column `{name}`" in caplog.text
    assert [row["key"] for row in rows_below(tmp_path / "out" / "data")] == [
        str(value) for value in values
    ]
    assert cli(*argv)[0] == 0, "the next run goes on with that column"
    assert status(str(tmp_path / "out")).decided["key_column"] == name


def test_a_column_that_a_file_lacks_names_no_rows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [jpg(1)], "id": [7]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"image": [jpg(2)]}), tmp_path / "in" / "b.parquet")
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert labelled.keys == ["0", "0"] and labelled.result.exit_code == 0
    (tmp_path / "in" / "b.parquet").rename(tmp_path / "b.parquet")
    label(tmp_path / "in", tmp_path / "later")
    (tmp_path / "b.parquet").rename(tmp_path / "in" / "b.parquet")
    later = label(tmp_path / "in", tmp_path / "later")
    assert later.keys == ["7", "0"]
    assert list(later.result.notes.values()) == [
        "no column `id` here: rows are named by their number"
    ]
    os.unlink(tmp_path / "later" / "_vitray" / "dataset.json")
    assert label(tmp_path / "in", tmp_path / "later").keys == ["7", "0"], (
        "a data file tells the key column"
    )
