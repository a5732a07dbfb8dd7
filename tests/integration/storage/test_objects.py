"""An object appears once and whole, and a read is of one version."""

from __future__ import annotations

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.s3 import new_bucket
from support.stores import MIB, below, client, put
from vitray.dataset import check_store, drop_scratch, scratch
from vitray.errors import ObjectChanged, ObjectMissing
from vitray.storage import exists, join, read, store_for


def test_create_makes_an_object_once_and_the_first_bytes_stay(root: str) -> None:
    store, url = store_for(root), join(root, "a", "b.bin")
    assert store.create(url, b"first", {"vitray-x": "1"}) is True
    assert store.create(url, b"second") is False
    assert read(url) == b"first"
    assert below(root) == ["a/b.bin"]


def test_an_empty_create_is_conditional_too(root: str) -> None:
    store, url, full = store_for(root), join(root, "empty"), join(root, "full")
    assert store.create(url, b"") is True
    assert store.create(url, b"") is False
    assert store.create(url, b"more") is False
    assert read(url) == b""
    assert store.create(full, b"bytes") is True
    assert store.create(full, b"") is False
    assert read(full) == b"bytes"


def test_replace_makes_and_overwrites(root: str) -> None:
    store, url = store_for(root), join(root, "r.json")
    store.replace(url, b"one")
    old_info = store.stat(url)
    store.replace(url, b"two, longer")
    new_info = store.stat(url)
    assert (
        read(url) == b"two, longer"
        and (old_info.size, new_info.size) == (3, 11)
        and old_info.version != new_info.version
    )
    assert below(root) == ["r.json"]


def test_delete_of_a_missing_object_is_fine(root: str) -> None:
    put(join(root, "kept"))
    put(join(root, "dropped"))
    store_for(root).delete([join(root, "never"), join(root, "dropped"), join(root, "no", "folder")])
    assert below(root) == ["kept"]
    assert exists(join(root, "kept")) and not exists(join(root, "dropped"))


def test_stat_open_and_read_of_a_missing_object_raise_object_missing(root: str) -> None:
    put(join(root, "other"))
    url = join(root, "absent.tar")
    for call in (store_for(root).stat, store_for(root).open, read):
        with pytest.raises(ObjectMissing, match=r"absent\.tar does not exist"):
            call(url)


def test_a_stream_is_seekable_and_a_long_read_is_whole(root: str) -> None:
    data, url = os.urandom(20 * MIB + 17), join(root, "long.bin")
    put(url, data)
    assert read(url) == data
    with store_for(url).open(url, store_for(url).stat(url).version) as stream:
        assert stream.seekable()
        assert stream.read(5) == data[:5] and stream.tell() == 5
        assert stream.seek(-7, os.SEEK_END) == len(data) - 7
        assert stream.read() == data[-7:] and stream.read() == b""
        stream.seek(9 * MIB)
        stream.seek(3, os.SEEK_CUR)
        assert stream.read(8 * MIB) == data[9 * MIB + 3 : 17 * MIB + 3]
        stream.seek(0)
        pieces = list(iter(lambda: stream.read(700_001), b""))
    assert b"".join(pieces) == data


def test_a_changed_object_is_not_opened(root: str) -> None:
    url = join(root, "c.tar")
    put(url, b"version one")
    planned = store_for(url).stat(url).version
    store_for(url).replace(url, b"version 2, another size")
    with pytest.raises(ObjectChanged, match=r"c\.tar changed since it was listed"):
        store_for(url).open(url, planned)
    with pytest.raises(ObjectChanged):
        read(url, planned)
    assert read(url, store_for(url).stat(url).version) == b"version 2, another size"


def test_sixteen_threads_create_one_object(root: str) -> None:
    for attempt in range(5):
        url, gate = join(root, f"race-{attempt}"), threading.Barrier(16)

        def race(n: int, url: str = url, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return store_for(url).create(url, b"%02d" % n * 1000)

        with ThreadPoolExecutor(16) as pool:
            won = list(pool.map(race, range(16)))
        assert won.count(True) == 1
        assert read(url) == b"%02d" % won.index(True) * 1000
    assert below(root) == [f"race-{n}" for n in range(5)]


def test_the_store_check_passes_and_leaves_nothing(root: str) -> None:
    put(join(root, "mine"))
    check_store(root)
    assert below(root) == ["mine"]


def test_scratch_is_gone_at_the_end_and_what_a_killed_process_left_goes_when_it_is_old(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drop_scratch(root) == []
    with pytest.raises(RuntimeError), scratch(root) as folder:
        put(join(folder, "64", "in", "0.tar"))
        put(join(folder, "64", "out", "data", "a.parquet"))
        raise RuntimeError
    assert below(root) == []
    killed = [
        join(root, "_vitray", "probe-1", "in", "0.tar"),
        join(root, "_vitray", "probe-1", "out", "b"),
        join(root, "_vitray", "probe-2"),
    ]
    kept = ["_vitray/probe", "_vitray/runs/probe-3", "data/probe-4"]
    for url in [*killed, *(join(root, name) for name in kept)]:
        put(url)
    assert (
        drop_scratch(f"{root}/") == [] and len(below(root)) == 6
    )  # somebody may be at work with it
    if "://" in root:
        monkeypatch.setattr("vitray.dataset.scratch_space.ABANDONED_S", -60)
    else:
        for url in killed[1:]:  # of a folder what changed last counts
            os.utime(url, (time.time() - 4000,) * 2)
        assert drop_scratch(root) == [killed[2]]
        os.utime(killed[0], (time.time() - 4000,) * 2)
    assert drop_scratch(root)[0] == join(root, "_vitray", "probe-1")
    assert below(root) == kept


def test_a_change_in_mid_read_is_seen(root: str) -> None:
    if "://" not in root:
        pytest.skip("a file that is open stays what it was")
    url = join(root, "m.bin")
    put(url, b"a" * (17 * MIB))
    for read_on in (lambda s: s.read(), lambda s: [s.read(MIB) for _ in range(16)]):
        with store_for(url).open(url) as stream:
            assert len(stream.read(10)) == 10
            store_for(url).replace(url, uuid.uuid4().bytes * MIB + b"b" * MIB)
            with pytest.raises(ObjectChanged, match=r"m\.bin changed while it was read"):
                read_on(stream)


@pytest.mark.parametrize("kind", ["mock", pytest.param("real", marks=pytest.mark.s3)])
def test_metadata_is_kept(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = new_bucket(request.getfixturevalue(f"{kind}_s3"), monkeypatch)
    assert store_for(bucket).create(
        join(bucket, "m"), b"", {"vitray-write-id": "7f", "vitray-rows": "12"}
    )
    head = client().head_object(Bucket=bucket.removeprefix("s3://"), Key="m")
    assert (
        head["Metadata"] == {"vitray-write-id": "7f", "vitray-rows": "12"}
        and head["ContentLength"] == 0
    )
