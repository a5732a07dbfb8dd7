"""A store on a local disk: permissions, links, full disks and odd names."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.stores import MIB, below, put, require_one_line_with_next_step
from vitray.dataset import check_store
from vitray.errors import AccessError, ObjectRefused, StorageError, UnsafeStore
from vitray.storage import exists, expand, join, read, reads, sha256_of, store_for


def test_a_replaced_local_file_is_read_to_its_end(tmp_path: Path) -> None:
    url = str(tmp_path / "m.bin")
    put(url, b"a" * 3 * MIB)
    with store_for(url).open(url) as stream:
        stream.read(10)
        store_for(url).replace(url, b"b" * 3 * MIB)
        assert stream.read() == b"a" * (3 * MIB - 10)


def test_a_file_system_without_hard_links_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    out = str(tmp_path / "out")
    for work in (lambda: store_for(out).create(join(out, "x"), b"x"), lambda: check_store(out)):
        with pytest.raises(UnsafeStore) as caught:
            work()
        require_one_line_with_next_step(caught.value, out, "no hard links", "Put `out` on")
    assert below(out) == []


@pytest.mark.parametrize(
    "path", ["/proc/self/mem", "/proc/sys/vm/drop_caches"]
)  # a bad disk's answer; no right to read
def test_a_file_that_cannot_be_read_is_refused(path: str) -> None:
    with pytest.raises(ObjectRefused) as caught, store_for(path).open(path) as stream:
        stream.read(1)
    require_one_line_with_next_step(caught.value, path)


NAMES = st.binary(min_size=1, max_size=12).filter(
    lambda name: not {0, 47} & set(name) and name.strip(b".") != b""
)


@given(
    st.sets(
        NAMES
        | st.sampled_from(
            [b"\xe9", rb"\udce9", rb"\udc5cudce9", b"\\", rb"\udc5c", b"\xff\\udc80"]
        ),
        max_size=6,
    )
)
def test_every_name_on_a_disk_has_a_url_of_its_own_which_leads_back(names: set[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(name)
        infos = store_for(folder).find(folder) if names else []
        assert {read(info.url, info.version) for info in infos} == names and len(infos) == len(
            names
        )
        assert all(info.url.encode() and info == store_for(folder).stat(info.url) for info in infos)
        ascii_names = {name for name in names if name.isascii() and b"\\" not in name}
        assert {f"{folder}/{name.decode()}" for name in ascii_names} <= {info.url for info in infos}
        store_for(folder).delete(info.url for info in infos)
        assert os.listdir(folder) == []


def test_a_folder_under_a_file_is_no_missing_object(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"I am a file")
    for url in (str(tmp_path / "file" / "x"), str(tmp_path / "file" / "deep" / "x")):
        for work in (store_for(url).create, store_for(url).replace):
            with pytest.raises(StorageError) as caught:
                work(url, b"x")
            assert type(caught.value) is AccessError
            require_one_line_with_next_step(caught.value, url)
        assert not exists(url)


def test_files_get_the_permissions_of_the_umask(tmp_path: Path) -> None:
    put(str(tmp_path / "a"))
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_left_over_temporaries_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / ".tmp-abc").write_bytes(b"half")
    put(str(tmp_path / "whole"))
    assert [i.url for i in store_for("/").find(str(tmp_path))] == [str(tmp_path / "whole")]


def test_delete_folder_removes_an_empty_one_only(tmp_path: Path) -> None:
    put(str(tmp_path / "full" / "x"))
    (tmp_path / "empty").mkdir()
    for name in ("full", "empty", "absent"):
        store_for("/").delete_folder(str(tmp_path / name))
    assert sorted(os.listdir(tmp_path)) == ["full"]


def test_a_local_path_may_be_relative_or_a_file_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    put("here/x.tar", b"relative")
    assert read(f"file://{tmp_path}/here/x.tar") == b"relative"
    assert (
        [i.url for i in expand("here")]
        == [i.url for i in expand("here/*.tar")]
        == [f"{tmp_path}/here/x.tar"]
    )


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(str(tmp_path / "x")) == hashlib.sha256(b"abc").hexdigest()


def test_a_place_beside_what_is_read_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not reads(str(tmp_path), "s3://bucket/out") and not reads(
        "s3://bucket/in", str(tmp_path / "out")
    )
    for pattern, out in (
        ("/a/in/*.parquet", "/a/in/out"),
        ("/a/in", "/a/in-out"),
        ("s3://a/in/*.tar", "s3://a/in/out"),
        ("/a/*/*", "/a/b/c"),
    ):
        assert not reads(pattern, out)
    for pattern, out in (
        ("s3://a/in/**", "s3://a/in/out"),
        ("s3://a/in", "s3://a/in"),
        ("/a/i?/**/*.parquet", "/a/in/b/c"),
    ):
        assert reads(pattern, out)
