"""Loose files that cannot be read, are no files or have odd names cost their own row."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.source_files import (
    IMAGES,
    image_members,
    job_for,
    only_shard,
    put_raw,
    read_all,
    write_csv,
    write_tar,
)
from vitray.dataset import base_of
from vitray.errors import JobError, ObjectChanged, ObjectRefused, ShardError, SourceError
from vitray.schema import End, Shard
from vitray.sources import Group, estimate_images, file_passthrough_schema, list_shards
from vitray.sources.objects import MAX_IMAGE_BYTES


@pytest.mark.parametrize("pattern", ["", "**/*.png"])
def test_files_whose_names_are_not_utf8_are_read_and_their_keys_are_escaped(
    tmp_path: Path, pattern: str
) -> None:
    """Also beside a file whose name looks like such a key, and below a folder with such a name."""
    names = {
        b"a.png": "a.png",
        b"caf\xe9.png": r"caf\udce9.png",
        rb"caf\udce9.png": r"caf\udc5cudce9.png",
    }
    names |= {b"s\xffb/x.png": r"s\udcffb/x.png", b"\xe2\x82.png": r"\udce2\udc82.png"}
    for name in names:
        put_raw(tmp_path, name, name)
    job = job_for(tmp_path / pattern)
    shard = only_shard(job)
    rows, end = read_all(shard, job)
    assert {row.key: row.data for row in rows} == {
        f"{tmp_path}/{key}": name for name, key in names.items()
    }
    assert end == End(5) and all(
        row.reason is None and row.key.encode() and row.uri == row.key for row in rows
    )
    groups = list_shards(job, []).new_groups
    assert list_shards(job, groups).shards == [shard], "the log of groups holds the keys"
    put_raw(tmp_path, b"caf\xe9.png", b"changed")
    with pytest.raises(ObjectChanged):
        read_all(shard, job)


def test_other_files_whose_names_are_not_utf8_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    for name in (b"README\xff", b"notes.t\xff", b"caf\xe9.txt"):
        put_raw(tmp_path, name, b"x")
    listing = list_shards(job_for(tmp_path), [])
    assert urls_of(listing.shards) == [["a.png"]] and listing.left_out == {
        "no_suffix": 2,
        "other_suffix": 1,
    }
    as_files = list_shards(job_for(tmp_path, format="files"), [])
    assert urls_of(as_files.shards) == [
        ["README\\udcff", "a.png", "notes.t\\udcff"]
    ] and as_files.left_out == {"other_suffix": 1}
    with pytest.raises(SourceError) as error:
        list_shards(job_for(tmp_path, format="parquet", source_rules=1), [])
    assert "holds nothing of format parquet" in str(error.value) and "1 .t\\udcff" in str(
        error.value
    )


def urls_of(shards: list[Shard]) -> list[list[str]]:
    return [[Path(m.url).name for m in s.members] for s in shards]


def test_membership_of_groups_is_fixed_when_files_arrive_change_and_vanish(tmp_path: Path) -> None:
    for name in ("b", "c", "d"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    job = job_for(tmp_path, group_size=2)
    one = list_shards(job, [])
    assert urls_of(one.shards) == [["b.png", "c.png"], ["d.png"]]
    assert [g.number for g in one.new_groups] == [0, 1] and one.shards[0].id.startswith(
        "files_000000-"
    )

    (tmp_path / "a.png").write_bytes(b"a")  # sorts before all others
    two = list_shards(job, one.new_groups)
    assert urls_of(two.shards) == [["b.png", "c.png"], ["d.png"], ["a.png"]]
    assert two.shards[:2] == one.shards and two.new_groups == [Group(2, (str(tmp_path / "a.png"),))]

    groups = [*one.new_groups, *two.new_groups]
    (tmp_path / "c.png").write_bytes(b"changed")
    three = list_shards(job, groups)
    assert three.new_groups == [] and {base_of(s.id) for s in three.shards} == {
        base_of(s.id) for s in two.shards
    }
    assert [a.id == b.id for a, b in zip(two.shards, three.shards)] == [False, True, True]
    with pytest.raises(ObjectChanged):
        read_all(two.shards[0], job)

    (tmp_path / "b.png").unlink()
    with pytest.raises(
        ObjectChanged, match="deleted since it was listed"
    ):  # no row says `missing` of what was there
        read_all(three.shards[0], job)
    (tmp_path / "d.png").unlink()
    four = list_shards(job, groups)
    assert urls_of(four.shards) == [["b.png", "c.png"], ["a.png"]]
    rows, end = read_all(four.shards[0], job)
    assert [(r.key, r.data, r.reason) for r in rows] == [
        (str(tmp_path / "b.png"), None, "missing"),
        (str(tmp_path / "c.png"), b"changed", None),
    ]
    assert end == End(2) and four.shards[0].rows == 2 and four.shards[0].size == 7


def test_a_file_beyond_the_cap_is_a_row_and_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "big.png", "wb") as stream:
        stream.truncate(MAX_IMAGE_BYTES + 1)
    job = job_for(tmp_path)
    rows, _ = read_all(only_shard(job), job)
    assert [(r.reason, r.data) for r in rows] == [("too_large", None)]


@pytest.mark.parametrize("pattern", ["", "*.png"])
def test_a_broken_link_and_a_pipe_are_rows_and_a_linked_folder_is_not_entered(
    tmp_path: Path, pattern: str
) -> None:
    (tmp_path / "in" / "folder.png").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(b"x")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in" / "c.png").symlink_to(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "d.png").symlink_to(tmp_path / "in" / "folder.png")
    os.mkfifo(tmp_path / "in" / "e.png")
    job = job_for(tmp_path / "in" / pattern)
    rows, end = read_all(only_shard(job), job)
    assert [(Path(r.key).name, r.data, r.reason) for r in rows] == [
        ("a.png", b"x", None),
        ("b.png", None, "missing"),
        ("c.png", b"x", None),
        ("e.png", None, "missing"),
    ]
    assert [r.message.rpartition("png ")[2] for r in rows if r.reason] == [
        "is a link to nothing",
        "is not a regular file",
    ]
    assert end == End(4)


FORBIDDEN, DYING = "Permission denied", "Input/output error"


def put_numbers(folder: Path, refused: set[int], why: str = FORBIDDEN) -> None:
    """40 files. Some link to kernel files that not even root may read, or that fail like a bad disk."""
    for n in range(40):
        if n in refused:
            (folder / f"{n:02d}.png").symlink_to(
                "/proc/sys/vm/drop_caches" if why == FORBIDDEN else f"/proc/{os.getpid()}/mem"
            )
        else:
            (folder / f"{n:02d}.png").write_bytes(b"%d" % n)


@pytest.mark.parametrize("why", [FORBIDDEN, DYING])
@pytest.mark.parametrize(
    "where", [{0}, {39}, {17, 18}, set(range(39)), set(range(1, 40)), set(range(20))]
)
def test_a_file_that_cannot_be_read_costs_its_own_row(
    tmp_path: Path, where: set[int], why: str
) -> None:
    put_numbers(tmp_path, where, why)
    job = job_for(tmp_path)
    rows, end = read_all(only_shard(job), job)
    assert end == End(40) and [row.index for row in rows] == list(range(40))
    assert [(row.data, row.reason) for row in rows] == [
        (None, "missing") if n in where else (b"%d" % n, None) for n in range(40)
    ]
    assert all(row.message.startswith(f"{row.uri}: {why}. ") for row in rows if row.reason)


@pytest.mark.parametrize("why", [FORBIDDEN, DYING])
def test_where_no_file_of_a_shard_can_be_read_it_is_not_the_files(tmp_path: Path, why: str) -> None:
    put_numbers(tmp_path, set(range(40)), why)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    job = job_for(tmp_path)
    with pytest.raises(ObjectRefused, match=f"png: {why}"):
        read_all(only_shard(job), job)


def test_files_in_a_folder_that_may_be_listed_and_not_entered_are_rows() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "closed").mkdir()
        for path in ("a.png", "closed/b.png"):
            (Path(name) / path).write_bytes(b"x")
        (Path(name) / "closed").chmod(0o444)
        user, job = os.geteuid(), job_for(name)
        if user == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)  # root may enter everywhere
        try:
            rows, _ = read_all(only_shard(job), job)
        finally:
            os.seteuid(user)
            (Path(name) / "closed").chmod(0o755)
    assert [(row.key, row.data, row.reason) for row in rows] == [
        (f"{name}/a.png", b"x", None),
        (f"{name}/closed/b.png", None, "missing"),
    ]
    assert rows[1].message == f"{name}/closed/b.png cannot be looked at: Permission denied"


def test_what_is_staged_already_speaks_for_the_store(tmp_path: Path) -> None:
    """After a restart only refused files may be left to read."""
    put_numbers(tmp_path, set(range(30, 40)))
    job = job_for(tmp_path)
    shard = only_shard(job)
    rows, _ = read_all(shard, job, lambda index: index >= 32)
    assert [(row.index, row.reason) for row in rows] == [(n, "missing") for n in range(32, 40)]


@pytest.mark.parametrize("suffix", ["tar", "parquet", "csv"])
def test_a_shard_that_cannot_be_read_is_one_broken_shard_and_the_listing_goes_on(
    tmp_path: Path, suffix: str
) -> None:
    write_tar(tmp_path / "b.tar", image_members())
    pq.write_table(pa.table({"image": list(IMAGES.values())}), tmp_path / "b.parquet")
    write_csv(tmp_path / "b.csv", [["path"], ["x.jpg"]])
    (tmp_path / f"a.{suffix}").symlink_to("/proc/sys/vm/drop_caches")
    job = job_for(tmp_path / f"*.{suffix}")
    broken, good = list_shards(job, []).shards
    assert read_all(good, job)[1].total == (1 if suffix == "csv" else len(IMAGES))
    assert estimate_images([broken, good], job)[1] is False
    with pytest.raises(ShardError, match=r"a\.\w+: Permission denied"):
        read_all(broken, job)


def test_a_broken_link_to_a_tar_is_a_broken_shard(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to(tmp_path / "nowhere")
    job = job_for(tmp_path / "*.tar")
    with pytest.raises(ShardError, match="does not exist any more"):
        read_all(only_shard(job), job)


def test_passthrough_columns_of_loose_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    job = job_for(tmp_path, keep=["caption"])
    with pytest.raises(JobError, match="caption"):
        file_passthrough_schema(only_shard(job), job)
