"""Folders as users had them: unusual suffixes, partitions, camera files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

import vitray
from support.user_inputs import MODEL, fields_of, job_for, jpg, label, write_files, write_tar
from vitray.errors import JobError
from vitray.operations.planning import plan, status


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


@pytest.mark.parametrize(
    ("path", "data"),
    [("filename", "data"), ("url", "jpg"), ("image_path", "image"), ("key", "blob")],
)
def test_bytes_with_a_usual_name_beat_a_name_of_the_file(
    tmp_path: Path, path: str, data: str
) -> None:
    pq.write_table(pa.table({path: ["elsewhere/a.jpg"], data: [jpg(1)]}), tmp_path / "a.parquet")
    assert label(tmp_path / "a.parquet", tmp_path / "out").result.rows == 1


def test_a_limit_that_chooses_every_shard_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path / "in", {f"{n:02d}.jpg": jpg(n) for n in range(12)})
    message = "limit chooses whole shards: 1 of 1 file shard, 12 of 12 images"
    assert f"selected   {message}" in str(plan(job_for(folder, tmp_path / "out", limit=3)))
    vitray.run(job_for(folder, tmp_path / "out", limit=3))
    assert caplog.messages[0] == message


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


def test_keys_that_come_again_are_noted_though_each_has_an_image(tmp_path: Path) -> None:
    names = ["0.jpg", "1.jpg", "2.jpg", "0.png", "1.png"]
    source = write_tar(tmp_path / "in" / "a.tar", {name: jpg(n) for n, name in enumerate(names)})
    labelled = label(source, tmp_path / "out")
    assert labelled.keys == ["0", "1", "2", "0", "1"]
    (note,) = labelled.result.notes.values()
    assert "2 times the key of an earlier sample comes again (first: 0)" in note


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


def test_the_first_page_of_a_tiff_is_read_and_the_others_are_counted(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    write_files(tmp_path / "in", {"a.tif": buffer.getvalue(), "b.tif": jpg(1, "TIFF")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert labelled.names == ["a.tif", "b.tif"] and labelled.result.left_out == {"further_page": 2}


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
