"""Inputs that real users had: every image gets a row or is counted, or the job is refused.

Each test names the public report that its input was built after.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

import vitray
from vitray.cli import main
from vitray.errors import JobError, ShardError, SourceError
from vitray.job import Job
from vitray.operations.planning import plan, status
from vitray.operations.validation import validate
from vitray.pipeline import Result
from vitray.sources.tar import dotted_extensions

MODEL = str(Path(__file__).parent / "data" / "dataset-v1" / "model")


def jpg(seed: int, form: str = "JPEG", **options: object) -> bytes:
    """A picture of its own for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((40, 30)).save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_files(folder: Path, names: dict[str, bytes]) -> Path:
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def job_for(source: object, out: Path, **fields: object) -> Job:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 8,
        "fragment_rows": 64,
        "compile": "off",
        "max_error_rate": 1,
    }
    return Job(**{"source": [str(source)], "model": MODEL, "out": str(out), **base, **fields})


class Labelled:
    """A run's result with its rows and its error rows, each in the order of shards and rows."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.rows = rows_below(Path(result.out, "data"))
        self.errors = rows_below(Path(result.errors_path))

    @property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows]

    @property
    def names(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self.keys]

    @property
    def reasons(self) -> dict[str, str]:
        return {row["key"].rpartition("/")[2]: row["reason"] for row in self.errors}


def rows_below(folder: Path) -> list[dict[str, object]]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def label(source: object, out: Path, **fields: object) -> Labelled:
    """A run of this source; the dataset that it leaves is valid and says the same as the run."""
    result = vitray.run(job_for(source, out, **fields))
    checked = validate(result.out, content=True)
    assert checked.ok, checked
    assert checked.left_out == result.left_out == status(result.out).left_out
    return Labelled(result)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """cli(*argv) -> (exit code, stdout, stderr), in this process."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    yield call


def fields_of(**fields: object) -> list[str]:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 8,
        "fragment_rows": 64,
        "max_error_rate": 1,
        **fields,
    }
    return [part for name, value in base.items() for part in ("--set", f"{name}={value}")]


# ---- 1: dots in the names of a tar's members (webdataset#237, datasets#7144)

DOTTED = ["Mr. Bean_0.jpg", "Mr. Bean_1.jpg", "Mr. T_0.jpg", "Robert Downey Jr._0.jpg"]


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


# ---- 2: several images in a sample (webdataset#20, datasets#7055)


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


def test_a_new_first_tar_with_several_plain_images_is_set_aside_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "b.tar", {"0.jpg": jpg(1)})
    label(tmp_path / "in", tmp_path / "out")
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(2), "0.webp": jpg(3, "WEBP")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert (labelled.result.exit_code, labelled.result.rows, len(labelled.result.set_aside)) == (
        3,
        1,
        1,
    )


def test_a_later_tar_with_several_plain_images_is_set_aside_and_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(1)})
    write_tar(tmp_path / "in" / "b.tar", {"0.jpg": jpg(2), "0.webp": jpg(3, "WEBP")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    (why,) = labelled.result.set_aside.values()
    assert labelled.result.exit_code == 3 and "jpg, webp. Set `image_member`" in why
    assert why in str(status(labelled.result.out))


# ---- 3: suffixes (thumbsup#368, fiftyone#1399)


def mixed_folder(folder: Path) -> Path:
    names = {
        "a.jpg": jpg(1),
        "b.jfif": jpg(2),
        "c.jpe": jpg(3),
        "IMG.HEIC": b"\0\0\0\x18ftypheic" + bytes(99),
    }
    return write_files(
        folder,
        {**names, "bare": jpg(4), "notes.txt": b"text", ".hidden.jpg": jpg(5), "s/e.PJPEG": jpg(6)},
    )


def test_unusual_suffixes_are_images_and_what_is_left_out_is_counted(
    tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    folder = mixed_folder(tmp_path / "in")
    labelled = label(folder, tmp_path / "out")
    assert labelled.names == ["a.jpg", "b.jfif", "c.jpe", "e.PJPEG"] and labelled.reasons == {
        "IMG.HEIC": "format_not_allowed"
    }
    assert labelled.errors[0]["message"] == "heic is not decoded: convert it to JPEG, PNG or WebP"
    assert labelled.result.left_out == {"hidden": 1, "no_suffix": 1, "other_suffix": 1}
    line = (
        "left out   3: 1 hidden, 1 no_suffix, 1 other_suffix; by suffix: 1 .txt, 1 without suffix"
    )
    for command in (
        ["plan", folder, "--model", MODEL, "--out", tmp_path / "out"],
        ["status", tmp_path / "out"],
    ):
        code, out, _ = cli(*command)
        assert code == 0 and line in out.splitlines()
    code, out, _ = cli(
        "run", folder, "--model", MODEL, "--out", tmp_path / "out", *fields_of(), "--json"
    )
    assert code == 0 and json.loads(out)["left_out"] == {
        "hidden": 1,
        "no_suffix": 1,
        "other_suffix": 1,
    }
    records = [
        json.loads(path.read_text()) for path in (tmp_path / "out" / "_vitray" / "runs").iterdir()
    ]
    assert records[-1]["left_out"] == labelled.result.left_out


def test_an_explicit_format_reads_files_without_a_suffix(tmp_path: Path) -> None:
    labelled = label(mixed_folder(tmp_path / "in"), tmp_path / "out", format="files")
    assert "bare" in labelled.names and labelled.result.left_out == {"hidden": 1, "other_suffix": 1}
    write_files(tmp_path / "bare", {"000000_0": b"no image", "000000_1": jpg(1)})
    bare = label(tmp_path / "bare", tmp_path / "out2", format="files")
    assert (bare.names, bare.reasons) == (["000000_1"], {"000000_0": "not_an_image"})
    pq.write_table(pa.table({"image": [jpg(1), jpg(2)]}), tmp_path / "000_0")
    assert label(tmp_path / "000_0", tmp_path / "out3", format="parquet").result.rows == 2
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "x.tar", {"0.jpg": jpg(1)}).rename(tmp_path / "tars" / "shard-0")
    assert label(tmp_path / "tars", tmp_path / "out4", format="tar").result.rows == 1


def test_camera_raw_is_no_tiff_of_its_thumbnail(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in",
        {
            "a.jpg": jpg(1),
            "b.NEF": jpg(2, "TIFF"),
            "c.dng": jpg(3, "TIFF"),
            "d.tif": jpg(4, "TIFF"),
        },
    )
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert labelled.names == ["a.jpg", "d.tif"] and labelled.reasons == dict.fromkeys(
        ("b.NEF", "c.dng"), "format_not_allowed"
    )


# ---- 5: types of passthrough columns: see tests/test_passthrough.py


# ---- 6: paths beside thumbnails


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


@pytest.mark.parametrize(
    ("path", "data"),
    [("filename", "data"), ("url", "jpg"), ("image_path", "image"), ("key", "blob")],
)
def test_bytes_with_a_usual_name_beat_a_name_of_the_file(
    tmp_path: Path, path: str, data: str
) -> None:
    pq.write_table(pa.table({path: ["elsewhere/a.jpg"], data: [jpg(1)]}), tmp_path / "a.parquet")
    assert label(tmp_path / "a.parquet", tmp_path / "out").result.rows == 1


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


# ---- 7: long fields of a CSV (datasette-lite#84)


def test_a_field_of_megabytes_costs_no_row(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": jpg(2)})
    long = "x" * 3_000_000
    (folder / "list.csv").write_text(f"path,text\na.jpg,{long}\nb.jpg,short\n")
    labelled = label(folder / "list.csv", tmp_path / "out", keep="text")
    assert [row["text"] for row in labelled.rows] == [long, "short"]


# ---- 8: limit and sample count shards


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
        and caplog.messages[0] == "limit chooses whole shards: 2 of 3 files shards, 8 of 12 images"
    )
    assert "not chosen 1 shard with 4 images, by since, sample or limit" in out.splitlines()
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


def test_a_limit_that_chooses_every_shard_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "in", {f"{n:02d}.jpg": jpg(n) for n in range(12)})
    message = "limit chooses whole shards: 1 of 1 files shard, 12 of 12 images"
    assert f"chosen     {message}" in str(plan(job_for(folder, tmp_path / "out", limit=3)))
    vitray.run(job_for(folder, tmp_path / "out", limit=3))
    assert caplog.messages[0] == message


# ---- 9: columns of categories, lists of images, paths in structs


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


# ---- 11: delimiters, encodings, backslashes, web addresses


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


# ---- the same kinds, after further reports


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
        "1 kept texts are not UTF-8 and were read as Windows-1252"
    ]


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


def test_a_file_without_a_passthrough_column_is_set_aside_wherever_it_comes(tmp_path: Path) -> None:
    for n, names in enumerate((["image"], ["image", "caption"])):
        for order in ("ab", "ba"):
            path = tmp_path / order / f"{order[n]}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(
                pa.table({name: [jpg(n)] if name == "image" else ["x"] for name in names}), path
            )
    for order in ("ab", "ba"):
        labelled = label(tmp_path / order, tmp_path / f"out-{order}", keep="caption")
        assert (
            labelled.result.exit_code,
            labelled.result.rows,
            len(labelled.result.set_aside),
        ) == (3, 1, 1)
    with pytest.raises(JobError, match="no column `captoin`"):
        vitray.run(job_for(tmp_path / "ab", tmp_path / "out", keep="captoin"))


def test_folders_that_look_like_patterns_and_partitions_are_read(tmp_path: Path) -> None:
    write_files(
        tmp_path / "in",
        {
            "[raw] 2024/a.jpg": jpg(1),
            "set {a,b}/b.jpg": jpg(2),
            "_year=2020/c.jpg": jpg(3),
            "@eaDir/d.jpg": jpg(4),
        },
    )
    assert label(tmp_path / "in" / "[raw] 2024" / "*.jpg", tmp_path / "out1").names == ["a.jpg"]
    assert label(tmp_path / "in" / "set {a,b}", tmp_path / "out2").names == ["b.jpg"]
    labelled = label(tmp_path / "in", tmp_path / "out3", keep="_year")
    assert sorted(labelled.names) == ["a.jpg", "b.jpg", "c.jpg"] and labelled.result.left_out == {
        "hidden": 1
    }
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert sorted(label(f"{tmp_path}/in/**", tmp_path / "out5").names) == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
    ]
    with pytest.raises(JobError, match=r"Write \*\*/\*\.jpg"):
        vitray.run(job_for(f"{tmp_path}/in/**.jpg", tmp_path / "out4"))


def test_pictures_with_much_metadata_are_good_and_negatives_are_positive(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 1200, dtype=np.uint16).reshape(30, 40)
    black, white = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(black, "TIFF")
    Image.fromarray(65535 - values).save(white, "TIFF", tiffinfo={262: 0})
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 2_000_000, zip=True)
    pictures = {
        "a.tif": black.getvalue(),
        "b.tif": white.getvalue(),
        "c.png": jpg(1, "PNG", pnginfo=info),
    }
    labelled = label(write_files(tmp_path / "in", pictures), tmp_path / "out")
    assert labelled.names == ["a.tif", "b.tif", "c.png"]
    assert labelled.rows[0]["embedding"] == labelled.rows[1]["embedding"]


# ---- 13: members that are not adjacent (webdataset#407)


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


def test_keys_that_come_again_are_noted_though_each_has_an_image(tmp_path: Path) -> None:
    names = ["0.jpg", "1.jpg", "2.jpg", "0.png", "1.png"]
    source = write_tar(tmp_path / "in" / "a.tar", {name: jpg(n) for n, name in enumerate(names)})
    labelled = label(source, tmp_path / "out")
    assert labelled.keys == ["0", "1", "2", "0", "1"]
    (note,) = labelled.result.notes.values()
    assert "2 times the key of an earlier sample comes again (first: 0)" in note


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


# ---- 14: a wider type in a later file (ray#40946)


def test_types_are_wide_enough_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n, kind in enumerate((pa.int32(), pa.int64(), pa.int8())):
        pq.write_table(
            pa.table({"image": [jpg(n)], "n": pa.array([n + 100], kind)}),
            tmp_path / "in" / f"{n}.parquet",
        )
    labelled = label(tmp_path / "in", tmp_path / "out", keep="n")
    assert [row["n"] for row in labelled.rows] == [100, 101, 102] and labelled.result.exit_code == 0
    kinds = {pq.read_schema(path).field("n").type for path in (tmp_path / "out" / "data").iterdir()}
    assert kinds == {pa.int64()}


def test_a_later_run_with_wider_integers_goes_on_while_they_fit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(
        pa.table({"image": [jpg(1)], "n": pa.array([1], pa.int32())}), tmp_path / "in" / "a.parquet"
    )
    assert label(tmp_path / "in", tmp_path / "out", keep="n").result.rows == 1
    pq.write_table(
        pa.table({"image": [jpg(2)], "n": pa.array([2], pa.int64())}), tmp_path / "in" / "b.parquet"
    )
    assert [row["n"] for row in label(tmp_path / "in", tmp_path / "out", keep="n").rows] == [1, 2]
    pq.write_table(
        pa.table({"image": [jpg(3)], "n": pa.array([1 << 40], pa.int64())}),
        tmp_path / "in" / "c.parquet",
    )
    third = vitray.run(job_for(tmp_path / "in", tmp_path / "out", keep="n"))
    (why,) = third.set_aside.values()
    assert third.exit_code == 3 and "column `n` does not fit the dataset's int32" in why


# ---- 15: readers of the whole directory


def test_readers_of_a_directory_see_good_rows_alone(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": b"no image", "c.jpg": jpg(2)})
    labelled = label(tmp_path / "in", tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out")
    assert list(frame["key"]) == labelled.keys and not frame["label"].isna().any()
    assert len(labelled.errors) == 1 and not (tmp_path / "out" / "errors").exists()


# ---- 16: a file of another kind among a dataset's


@pytest.mark.parametrize(
    "name", ["labels.csv", "more.tar", "x.parquet", "old.tar.gz", "list.jsonl"]
)
def test_a_file_of_another_kind_does_not_stop_the_next_run(tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    assert label(folder, tmp_path / "out").result.left_out == {}
    write_files(folder, {name: b"path\nx\n", "b.jpg": jpg(2)})
    labelled = label(folder, tmp_path / "out")
    assert sorted(labelled.names) == ["a.jpg", "b.jpg"]
    assert labelled.result.exit_code == 0 and labelled.result.left_out == {"other_kind": 1}
    with pytest.raises(SourceError, match=r"is a mix|compressed"):
        vitray.run(job_for(folder, tmp_path / "new"))
    os.unlink(folder / "a.jpg")
    os.unlink(folder / "b.jpg")
    with pytest.raises(SourceError, match="holds nothing of format files"):
        vitray.run(job_for(folder, tmp_path / "out"))  # it does not become a dataset of that kind
    elsewhere = write_files(
        tmp_path / "elsewhere", {"a.tar": b"", "b.tar": b"", "preview.jpg": jpg(3)}
    )
    with pytest.raises(SourceError, match="is a mix"):
        vitray.run(
            job_for(elsewhere, tmp_path / "out")
        )  # another source: nothing is known of its kind


# ---- 17: columns that folders spell out


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


def test_a_manifest_keeps_the_folders_of_its_images(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"cat/a.jpg": jpg(1), "dog/b.jpg": jpg(2)})
    (folder / "list.csv").write_text("path,n\ncat/a.jpg,1\ndog/b.jpg,2\nnot,a,row\n")
    labelled = label(folder / "list.csv", tmp_path / "out", keep="n,folder")
    assert [(row["n"], row["folder"]) for row in labelled.rows] == [("1", "cat"), ("2", "dog")]


# ---- 19: pages of a TIFF


def test_the_first_page_of_a_tiff_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    write_files(tmp_path / "in", {"a.tif": buffer.getvalue(), "b.tif": jpg(1, "TIFF")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert labelled.names == ["a.tif", "b.tif"] and labelled.result.left_out == {"further_page": 2}


# ---- 20: keys of Parquet rows


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


def test_images_with_paths_keep_them_as_keys(tmp_path: Path) -> None:
    images = [{"bytes": jpg(n), "path": f"{n}.jpg"} for n in range(2)]
    pq.write_table(pa.table({"id": [5, 6], "image": images}), tmp_path / "a.parquet")
    assert label(tmp_path / "a.parquet", tmp_path / "out").keys == ["0.jpg", "1.jpg"]


# ---- a first run that fails


def test_a_first_run_that_fails_binds_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})

    def refuse(*_: object) -> None:
        raise ShardError("the first run fails here")

    with monkeypatch.context() as patched:
        patched.setattr("vitray.pipeline.runner.check_data", refuse)
        with pytest.raises(ShardError):
            vitray.run(job_for(folder, tmp_path / "out", top_k=1))
    assert status(str(tmp_path / "out")).last_run["ended"] == "ShardError: the first run fails here"
    assert label(folder, tmp_path / "out", top_k=2).result.rows == 1


def test_a_first_run_that_committed_nothing_binds_no_later_one(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.tar": b"no tar at all, but long enough" * 99})
    first = vitray.run(job_for(tmp_path / "in", tmp_path / "out", top_k=1))
    assert (first.exit_code, first.shards) == (3, 0)
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(1)})
    assert label(tmp_path / "in", tmp_path / "out", top_k=2).result.rows == 1
    with pytest.raises(JobError, match="top_k differs"):
        vitray.run(job_for(tmp_path / "in", tmp_path / "out", top_k=1))


def test_a_lost_dataset_json_is_created_again(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    label(folder, tmp_path / "out")
    document = tmp_path / "out" / "_vitray" / "dataset.json"
    document.write_bytes(b"{")
    with pytest.raises(vitray.errors.StorageError, match="move it away and run the same job again"):
        vitray.run(job_for(folder, tmp_path / "out"))
    os.unlink(document)
    assert label(folder, tmp_path / "out").result.rows == 1
    with pytest.raises(JobError, match="another job"):
        os.unlink(document)
        vitray.run(job_for(folder, tmp_path / "out", top_k=1))


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


# ---- a first run that failed


def test_a_failed_run_does_not_bind_the_kind_of_the_source(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.tar": b"no tar"})
    assert vitray.run(job_for(tmp_path / "in", tmp_path / "out")).exit_code == 3
    (tmp_path / "in" / "a.tar").unlink()
    write_files(tmp_path / "in", {f"{n}.jpg": jpg(n) for n in range(3)})
    assert plan(job_for(tmp_path / "in", tmp_path / "out")).pending_images == 3
    assert vitray.run(job_for(tmp_path / "in", tmp_path / "out")).rows == 3


def test_status_shows_a_run_that_failed_before_it_read_an_image(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"0.jpg": jpg(0)})
    label(folder, tmp_path / "out")
    records = tmp_path / "out" / "_vitray" / "runs"
    record = {"run": "x", "finished": "2030-01-01T00:00:00+00:00", "ended": "StorageError: full"}
    (records / "2030-01-01-x.json").write_text(json.dumps(record))
    text = str(status(str(tmp_path / "out")))
    assert "last run   2030-01-01T00:00:00+00:00\n" in text and "StorageError: full" in text
