"""Tar sources: samples, keys, sidecar files, links and sizes."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.source_files import Members, job_for, kept, only_shard, pairs, read_tar, write_tar
from vitray.errors import ShardError, SourceError
from vitray.schema import End
from vitray.sources import absent_members, estimate_images, file_passthrough_schema, list_shards
from vitray.sources.objects import MAX_IMAGE_BYTES


def test_an_ambiguous_source_is_refused_with_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x")])
    (tmp_path / "b.png").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"1 \.tar, 1 \.png|1 \.png, 1 \.tar") as error:
        list_shards(job_for(tmp_path), [])
    assert "format:" in str(error.value)
    assert [s.url for s in list_shards(job_for(tmp_path, format="tar"), []).shards] == [
        str(tmp_path / "a.tar")
    ]
    assert list_shards(job_for(tmp_path, format="files"), []).shards[0].members[0].url == str(
        tmp_path / "b.png"
    )


def test_a_sample_is_consecutive_members_with_one_key(tmp_path: Path) -> None:
    members: Members = [
        ("d/one.jpg", b"1"),
        ("d/one.txt", "café".encode()),
        ("d/one.cls", b"7"),
        ("two.seg.png", b"mask"),
        ("two.JPG", b"2"),
        ("two.bin", b"\xff\x00"),
        ("three.json", b"{}"),
        ("three.txt", b"\xff"),
        ("d/._one.jpg", b"AppleDouble"),
        (".hidden.jpg", b"no"),
        ("README", b"no extension"),
        ("one.jpg", b"another folder"),
    ]
    rows, end = read_tar(write_tar(tmp_path / "a.tar", members), keep=["txt", "bin", "cls"])
    assert pairs(rows) == [
        (0, "d/one", b"1"),
        # No other sample has seg.png, so it is part of a name.
        (1, "two.seg", b"mask"),
        (2, "two", b"2"),
        (3, "three", None),
        (4, "one", b"another folder"),
    ]
    assert [kept(r) for r in rows] == [
        ("café", None, "7"),
        (None, None, None),
        (None, b"\xff\x00", None),
        ("ÿ", None, None),
        (None, None, None),
    ]
    assert rows[3].reason == "missing" and "json, txt" in rows[3].message
    assert end == End(
        5,
        None,
        "2 hidden members were skipped; "
        "1 members without an extension were skipped; 1 passthrough texts are not UTF-8 and were read as "
        "Windows-1252",
    )
    assert end.left_out == {"hidden": 2, "no_suffix": 1} and end.image_members == {
        "jpg": 3,
        "png": 1,
    }
    chosen, _ = read_tar(tmp_path / "a.tar", image_member="jpg")
    assert [(r.data, r.reason) for r in chosen] == [
        (b"1", None),
        (b"2", None),
        (None, "missing"),
        (b"another folder", None),
    ]
    job = job_for(tmp_path / "a.tar", keep=["txt", "bin", "json"])
    want = pa.schema([("txt", pa.string()), ("bin", pa.binary()), ("json", pa.string())])
    assert file_passthrough_schema(only_shard(job), job) == want


def test_keep_folder_is_the_folder_of_the_member_else_that_of_the_tar(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    members: Members = [
        ("cat/1.jpg", b"1"),
        ("a/dog/2.jpg", b"2"),
        ("3.jpg", b"3"),
        ("x/4.jpg", b"4"),
        ("x/4.folder", b"own"),  # a member of that extension comes first
    ]
    rows, _ = read_tar(write_tar(tmp_path / "train" / "a.tar", members), keep=["folder"])
    assert [kept(row) for row in rows] == [("cat",), ("dog",), ("train",), ("own",)]


def test_one_name_twice_is_two_rows(tmp_path: Path) -> None:
    rows, _ = read_tar(write_tar(tmp_path / "a.tar", [("x.jpg", b"old"), ("x.JPG", b"new")]))
    assert pairs(rows) == [(0, "x", b"old"), (1, "x", b"new")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_honoured(tmp_path: Path, form: int) -> None:
    names = ["d" * 150 + "/" + "n" * 180, "übergröße/日本", "short"]
    rows, end = read_tar(
        write_tar(tmp_path / "a.tar", [(f"{n}.jpg", n.encode()) for n in names], form)
    )
    assert pairs(rows) == [(i, n, n.encode()) for i, n in enumerate(names)] and end == End(3)


def test_a_size_in_a_pax_header_is_honoured(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"size": "1000"}
    body = info.tobuf(tarfile.PAX_FORMAT) + b"a" * 1000 + bytes(24)
    info = tarfile.TarInfo("y.jpg")
    (tmp_path / "a.tar").write_bytes(body + info.tobuf() + bytes(1024))
    rows, end = read_tar(tmp_path / "a.tar")
    assert pairs(rows) == [(0, "x", b"a" * 1000), (1, "y", b"")] and end == End(2)


def test_a_name_that_is_not_utf8_is_a_valid_key(tmp_path: Path) -> None:
    info = tarfile.TarInfo("caf\udce9.jpg")
    (tmp_path / "a.tar").write_bytes(
        info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape") + bytes(1024)
    )
    rows, _ = read_tar(tmp_path / "a.tar")
    assert rows[0].key == "caf\\udce9" and rows[0].key.encode()


def test_links_are_error_rows_directories_and_devices_no_members_and_names_are_no_paths(
    tmp_path: Path,
) -> None:
    path = tmp_path / "s/a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, kind in (
            ("d.jpg", tarfile.DIRTYPE),
            ("f.jpg", tarfile.FIFOTYPE),
            ("c.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size = kind, 0
            archive.addfile(info)
        for name, kind in (("s.jpg", tarfile.SYMTYPE), ("l.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ("../../escape.jpg", "/abs/olute.jpg", "in\x01side.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"i"))
    rows, end = read_tar(path)
    assert [(row.key, row.reason) for row in rows[:2]] == [("s", "missing"), ("l", "missing")]
    assert (
        "a link to /etc/passwd, which is not followed" in rows[0].message and rows[0].data is None
    )
    assert pairs(rows[2:]) == [
        (2, "../../escape", b"i"),
        (3, "/abs/olute", b"i"),
        (4, "in\x01side", b"i"),
    ]
    assert end == End(5, None, "2 special files were skipped")
    assert [p.name for p in tmp_path.rglob("*")] == ["s", "a.tar"]


def test_a_member_beyond_the_cap_is_a_row_and_the_rest_goes_on(tmp_path: Path) -> None:
    big = tarfile.TarInfo("big.jpg")
    big.size = MAX_IMAGE_BYTES + 512
    last_member = tarfile.TarInfo("after.jpg")
    with open(
        tmp_path / "a.tar", "wb"
    ) as stream:  # a hole on disk: nothing is written, and nothing may be read
        stream.write(big.tobuf())
        stream.seek(big.size, os.SEEK_CUR)
        stream.write(last_member.tobuf() + bytes(1024))
    rows, end = read_tar(tmp_path / "a.tar")
    assert [(r.key, r.reason, r.data) for r in rows] == [
        ("big", "too_large", None),
        ("after", None, b""),
    ]
    assert end == End(2)


def test_passthrough_extensions_that_no_sample_has_are_reported(tmp_path: Path) -> None:
    members: Members = [("a.jpg", b"1"), ("a.TXT", b"x"), ("b.jpg", b"2"), ("b.seg.png", b"3")]
    job = job_for(
        write_tar(tmp_path / "a.tar", members), keep=["txt", ".cls", "seg.png", "png", "JSON"]
    )
    assert absent_members(only_shard(job), job) == ["cls", "png", "json"]
    assert absent_members(only_shard(job), job_for(tmp_path / "a.tar")) == []
    empty = job_for(write_tar(tmp_path / "empty.tar", []), keep=["txt"])
    assert absent_members(only_shard(empty), empty) == []
    pq.write_table(pa.table({"image": [b"x"], "txt": ["t"]}), tmp_path / "a.parquet")
    other = job_for(tmp_path / "a.parquet", keep=["txt"])
    assert absent_members(only_shard(other), other) == []


def test_absent_members_are_looked_for_at_the_start_of_a_tar_only(tmp_path: Path) -> None:
    far = tarfile.TarInfo("b.bin")
    far.size = 65 << 20
    with open(tmp_path / "a.tar", "wb") as stream:
        stream.write(tarfile.TarInfo("a.jpg").tobuf() + far.tobuf())
        stream.seek(far.size, os.SEEK_CUR)
        stream.write(
            tarfile.TarInfo("c.jpg").tobuf() + tarfile.TarInfo("d.txt").tobuf() + bytes(1024)
        )
    job = job_for(tmp_path / "a.tar", keep=["bin", "txt"])
    assert absent_members(only_shard(job), job) == ["txt"]
    (tmp_path / "a.tar").write_bytes(b"broken")
    with pytest.raises(ShardError, match="not a tar"):
        absent_members(only_shard(job), job)


def test_an_image_survives_when_only_its_caption_was_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.txt", b"b" * 600)])
    path.write_bytes(path.read_bytes()[: 512 * 3 + 100])
    rows, end = read_tar(path, keep=["txt"])
    assert [(r.key, r.data, kept(r)) for r in rows] == [("a", b"a", (None,))] and (
        end.total,
        end.truncated_at,
    ) == (1, 1024)


def test_an_empty_tar_has_no_rows_and_is_whole(tmp_path: Path) -> None:
    assert read_tar(write_tar(tmp_path / "a.tar", [])) == ([], End(0))


def test_estimates_of_small_tars_are_exact(tmp_path: Path, whole_tar: bytes) -> None:
    for n in range(4):
        (tmp_path / f"{n}.tar").write_bytes(whole_tar)
    job = job_for(tmp_path)
    assert estimate_images(list_shards(job, []).shards, job) == (28, True)
    for n in range(4, 12):
        (tmp_path / f"{n:02d}.tar").write_bytes(whole_tar)
    assert estimate_images(list_shards(job, []).shards, job) == (84, False)
    (tmp_path / "0.tar").write_bytes(b"broken")
    count, exact = estimate_images(list_shards(job, []).shards, job)
    assert not exact and 70 <= count <= 84
