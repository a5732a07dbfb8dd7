"""Cut and damaged tars: whole samples are read, and the damage is reported."""

from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path

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
from vitray.errors import ShardError
from vitray.schema import End


def data_ends() -> list[int]:
    """Where each image's last byte is in whole_tar."""
    ends, at = [], 0
    for data in IMAGES.values():
        ends.append(at + 512 + len(data))
        at += 512 + -(-len(data) // 512) * 512
    return ends


def member_starts() -> list[int]:
    return [0] + [-(-end // 512) * 512 for end in data_ends()]


def cuts() -> Iterator[int]:
    for start, end in zip(member_starts(), data_ends()):
        yield from (
            start + 1,
            start + 511,
            start + 512,
            start + 513,
            end - 1,
            end,
            end + 1,
            -(-end // 512) * 512,
        )
    last = member_starts()[-1]
    yield from (last + 1, last + 512, last + 1023)


@pytest.mark.parametrize("size", sorted(set(cuts())))
def test_a_cut_tar_gives_its_whole_rows_and_a_verdict(
    tmp_path: Path, whole_tar: bytes, size: int
) -> None:
    (tmp_path / "a.tar").write_bytes(whole_tar[:size])
    job = job_for(tmp_path)
    shard = only_shard(job)
    if size < 512:
        with pytest.raises(ShardError, match="not a tar"):
            read_all(shard, job)
        return
    rows, end = read_all(shard, job)
    survivors = sum(data_end <= size for data_end in data_ends())
    assert pairs(rows) == expected(IMAGES)[:survivors]
    assert end.total == survivors and end.note
    starts = member_starts()
    assert end.truncated_at is not None and starts[survivors] - 511 <= end.truncated_at <= max(
        starts[survivors], size
    )
    again = read_all(shard, job, lambda index: False)
    assert again == ([], end), "what is skipped must not change the verdict"


def test_a_tar_without_any_end_marker_is_truncated_at_its_end(
    tmp_path: Path, whole_tar: bytes
) -> None:
    size = member_starts()[-1]
    (tmp_path / "a.tar").write_bytes(whole_tar[:size])
    rows, end = read_tar(tmp_path / "a.tar")
    assert pairs(rows) == expected(IMAGES) and end == End(7, size, "the end marker is missing")


def test_a_sample_whose_image_was_cut_away_is_in_the_verdict_and_no_error_row(
    tmp_path: Path,
) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("b.txt", b"b"), ("b.jpg", b"c" * 600)])
    path.write_bytes(path.read_bytes()[: 512 * 5 + 100])
    rows, end = read_tar(path)
    assert pairs(rows) == [(0, "a", b"a")] and (end.total, end.truncated_at) == (1, 1024)


@pytest.mark.parametrize("where", [1, 3, 6])
def test_a_damaged_header_ends_the_tar_there(tmp_path: Path, whole_tar: bytes, where: int) -> None:
    at = member_starts()[where]
    broken = bytearray(whole_tar)
    broken[at + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(broken)
    rows, end = read_tar(tmp_path / "a.tar")
    assert pairs(rows) == expected(IMAGES)[:where] and (end.total, end.truncated_at) == (where, at)
    assert "damaged header" in end.note


def test_one_wrong_bit_in_any_field_of_a_header_is_seen(tmp_path: Path, whole_tar: bytes) -> None:
    names = (
        "name mode uid gid size mtime chksum typeflag linkname magic version uname gname devmajor "
        "devminor prefix padding"
    )
    offsets = (0, 100, 108, 116, 124, 136, 148, 156, 157, 257, 263, 265, 297, 329, 337, 345, 500)
    at = member_starts()[2]
    for name, offset in zip(names.split(), offsets):
        broken = bytearray(whole_tar)
        broken[at + offset] ^= 1
        (tmp_path / "a.tar").write_bytes(broken)
        rows, end = read_tar(tmp_path / "a.tar")
        assert pairs(rows) == expected(IMAGES)[:2] and (end.total, end.truncated_at) == (2, at), (
            name
        )
        assert "damaged header" in end.note, name


def test_bytes_after_the_end_marker_are_reported(tmp_path: Path, whole_tar: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(
        whole_tar + whole_tar
    )  # `cat a.tar b.tar`: the second half must not be lost unseen
    rows, end = read_tar(tmp_path / "a.tar")
    assert pairs(rows) == expected(IMAGES)
    assert end == End(7, len(whole_tar), "there are bytes after the end marker")
    marker = member_starts()[-1]
    (tmp_path / "a.tar").write_bytes(whole_tar[: marker + 512] + b"\0\0junk")
    assert read_tar(tmp_path / "a.tar")[1].truncated_at == marker + 514


def test_a_sparse_member_is_reported_and_not_misread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    good = tarfile.TarInfo("a.jpg").tobuf()
    (tmp_path / "a.tar").write_bytes(good + info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    rows, end = read_tar(tmp_path / "a.tar")
    assert pairs(rows) == [(0, "a", b"")] and end.truncated_at == 512 and "sparse" in end.note


def test_an_enormous_extended_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2 << 20
    (tmp_path / "a.tar").write_bytes(info.tobuf() + b"a" * info.size + bytes(1024))
    assert read_tar(tmp_path / "a.tar") == ([], End(0, 0, "an extended header of 2097152 bytes"))


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("gzip", gzip.compress(b"x" * 5000, mtime=0), "gzip"),
        ("text", b"hello " * 500, "not a tar"),
        ("empty", b"", "it is empty"),
        ("zeros", bytes(700), "not a tar"),
        ("odd zeros", bytes(1500), "not a tar"),
        ("zeros, then data", bytes(2048) + b"x" * 512, "not a tar"),
    ],
)
def test_what_is_no_tar_is_a_broken_shard(
    tmp_path: Path, name: str, body: bytes, says: str
) -> None:
    (tmp_path / "a.tar").write_bytes(body)
    with pytest.raises(ShardError, match=says):
        read_tar(tmp_path / "a.tar")


def test_a_shard_that_vanished_after_listing_is_a_broken_shard(tmp_path: Path) -> None:
    job = job_for(write_tar(tmp_path / "a.tar", image_members()))
    shard = only_shard(job)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ShardError, match="does not exist any more"):
        read_all(shard, job)
