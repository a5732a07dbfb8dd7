"""Sources: the same bytes from every format, every byte accounted for, only allowed paths read."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
import pwd
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import new_bucket
from s3_proxy import FORWARD, Proxy, proxied

from vitray import storage
from vitray.dataset import base_of
from vitray.errors import JobError, ObjectChanged, ObjectRefused, ShardError, SourceError
from vitray.job import Job, make_job
from vitray.schema import Encoded, End, Shard
from vitray.sources import (
    Group,
    absent_members,
    estimate_images,
    file_passthrough_schema,
    list_shards,
    read_shard,
)
from vitray.sources.objects import MAX_IMAGE_BYTES

IMAGES = {f"img{n:02d}": b"\xff\xd8" + bytes([n]) * (300 + 211 * n) for n in range(7)}
Members = list[tuple[str, bytes]]


def job_for(*source: Path | str, **fields: object) -> Job:
    return make_job({"source": [str(s) for s in source], "model": "m", "out": "o", **fields})


def read_all(
    shard: Shard, job: Job, is_wanted: Callable[[int], bool] = lambda index: True
) -> tuple[list[Encoded], End]:
    *rows, end = read_shard(shard, job, is_wanted)
    assert isinstance(end, End) and all(isinstance(row, Encoded) for row in rows)
    return rows, end


def only_shard(job: Job) -> Shard:
    (shard,) = list_shards(job, []).shards
    return shard


def kept(row: Encoded) -> tuple[object, ...]:
    """The passthrough values of one image."""
    assert row.passthrough is not None
    return tuple(column[row.passthrough.row].as_py() for column in row.passthrough.batch.columns)


def pairs(rows: list[Encoded]) -> list[tuple[int, str, bytes | None]]:
    return [(row.index, row.key, row.data) for row in rows]


def expected(images: dict[str, bytes]) -> list[tuple[int, str, bytes]]:
    return [(n, key, data) for n, (key, data) in enumerate(images.items())]


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def image_members() -> Members:
    return [(f"{key}.jpg", data) for key, data in IMAGES.items()]


def read_tar(path: Path, **fields: object) -> tuple[list[Encoded], End]:
    job = job_for(path, format="tar", **fields)
    return read_all(only_shard(job), job)


# ---- the same images in every format


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


# ---- listing


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


def put_raw(folder: Path, name: bytes, data: bytes) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


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


def test_a_single_object_is_taken_whatever_its_suffix_when_format_is_set(tmp_path: Path) -> None:
    write_tar(tmp_path / "archive", image_members())
    with pytest.raises(SourceError, match="without suffix"):
        list_shards(job_for(tmp_path / "archive"), [])
    assert pairs(read_tar(tmp_path / "archive")[0]) == expected(IMAGES)


# ---- loose files


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
        "is no regular file",
    ]
    assert end == End(4)


# ---- objects that cannot be had

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


@pytest.fixture
def behind(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, Job]]:
    """A proxy before an S3 server, and a job on the 40 images there."""
    with proxied(mock_s3) as proxy:
        bucket = new_bucket(proxy.url, monkeypatch)
        for n in range(40):
            storage.store_for(bucket).create(f"{bucket}/in/{n:02d}.png", b"%d" % n)
        yield proxy, job_for(f"{bucket}/in")


@pytest.mark.parametrize("method", ["HEAD", "GET"])  # no right to it; in an archive
def test_an_object_that_s3_refuses_costs_its_own_row(
    behind: tuple[Proxy, Job], method: str
) -> None:
    proxy, job = behind
    shard = only_shard(job)
    proxy.rule = lambda call: (
        403 if call.method == method and "/in/00.png" in call.path else FORWARD
    )
    rows, _ = read_all(shard, job)
    assert [(row.data, row.reason) for row in rows[:2]] == [
        (None, "missing"),
        (b"1", None),
    ] and "access refused" in rows[0].message
    assert [row.data for row in rows[2:]] == [b"%d" % n for n in range(2, 40)]


@pytest.mark.parametrize("good_reads", [0, 25, 61])
def test_rights_that_are_lost_during_a_read_make_no_bad_image(
    behind: tuple[Proxy, Job], good_reads: int
) -> None:
    """Keys that expire refuse every object from then on: no row may say that its image was bad."""
    proxy, job = behind
    shard = only_shard(job)
    proxy.calls.clear()
    proxy.rule = lambda call: 403 if len(proxy.calls) > good_reads else FORWARD
    rows = []
    with pytest.raises(ObjectRefused):
        for row in read_shard(shard, job, lambda index: True):
            rows.append(row)
    assert all(isinstance(row, Encoded) and row.reason is None for row in rows)


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


# ---- tars: samples


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
        "1 members without an extension were skipped; 1 kept texts are not UTF-8 and were read as "
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


# ---- tars: every byte is accounted for


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("w") / "a.tar", image_members()).read_bytes()


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


def test_an_image_survives_when_only_its_caption_was_cut(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"a"), ("a.txt", b"b" * 600)])
    path.write_bytes(path.read_bytes()[: 512 * 3 + 100])
    rows, end = read_tar(path, keep=["txt"])
    assert [(r.key, r.data, kept(r)) for r in rows] == [("a", b"a", (None,))] and (
        end.total,
        end.truncated_at,
    ) == (1, 1024)


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


def test_an_empty_tar_has_no_rows_and_is_whole(tmp_path: Path) -> None:
    assert read_tar(write_tar(tmp_path / "a.tar", [])) == ([], End(0))


def test_a_shard_that_vanished_after_listing_is_a_broken_shard(tmp_path: Path) -> None:
    job = job_for(write_tar(tmp_path / "a.tar", image_members()))
    shard = only_shard(job)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ShardError, match="does not exist any more"):
        read_all(shard, job)


# ---- Parquet


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


READ_ALL = """
import os, sys, time
from vitray.job import make_job
from vitray.sources import file_passthrough_schema, list_shards, read_shard
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
def settled():  # a joined thread stays listed for a moment, one of a pool for ever
    return any(threads() == before or time.sleep(0.05) for _ in range(100))
for source in sys.argv[1:]:
    job = make_job({"source": source, "model": "m", "out": "o", "keep": ["n"]})
    for shard in list_shards(job, []).shards:
        file_passthrough_schema(shard, job)
        items = read_shard(shard, job, lambda index: True)
        next(items)
        assert shard.kind == "manifest" or settled(), "pyarrow started a thread"
        assert len(list(items)) == 100 and settled()
"""


def test_parquet_is_read_by_the_calling_thread_alone(tmp_path: Path) -> None:
    """A pyarrow thread with a Python buffer at the end of the interpreter aborts the process."""
    values = [os.urandom(1000) for _ in range(100)]
    pq.write_table(
        pa.table({"image": values, "n": range(100)}), tmp_path / "a.parquet", row_group_size=40
    )
    pq.write_table(
        pa.table({"path": ["none.jpg"] * 100, "n": range(100)}),
        tmp_path / "m.parquet",
        row_group_size=40,
    )
    argv = [
        sys.executable,
        "-c",
        READ_ALL,
        str(tmp_path / "a.parquet"),
        str(tmp_path / "m.parquet"),
    ]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60).stderr == ""


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


# ---- manifests


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path


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


# ---- estimates


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
