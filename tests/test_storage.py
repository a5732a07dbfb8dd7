"""What a store promises: an object appears once and whole, a read is of one version, a failure is
one clear message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from conftest import KEYS, new_bucket
from hypothesis import given
from hypothesis import strategies as st
from s3_proxy import FORWARD, LOSE, Call, Proxy, proxied

from vitray.dataset import check_store, drop_scratch, scratch
from vitray.errors import (
    JobError,
    ObjectChanged,
    ObjectMissing,
    ObjectRefused,
    StorageError,
    UnsafeStore,
)
from vitray.storage import (
    exists,
    expand,
    expand_braces,
    join,
    read,
    reads,
    sha256_of,
    store_for,
)

MIB = 1 << 20


def put(url: str, data: bytes = b"x") -> None:
    assert store_for(url).create(url, data)


def below(root: str) -> list[str]:
    """Names of all that is stored, temporary files too."""
    if "://" in root:
        return [info.url.removeprefix(root + "/") for info in store_for(root).find(root)]
    return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file())


def client() -> object:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


def require_one_line_with_next_step(error: StorageError, *words: str) -> None:
    text = str(error)
    assert "\n" not in text and text.endswith(".") and len(text) < 600
    assert "Traceback" not in text
    for word in words:
        assert word in text


# ---- the contract, on a local disk, on a mock and on a real S3 server


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


def test_find_stat_and_glob_agree(root: str) -> None:
    names = ["a/1.tar", "a/2.tar", "a/deep/3.tar", "ab/4.tar", "b.txt"]
    for n, name in enumerate(names):
        put(join(root, name), b"x" * n)
    store = store_for(root)
    infos = store.find(root)
    assert [(i.url, i.size) for i in infos] == [
        (join(root, name), n) for n, name in enumerate(names)
    ]
    assert [store.stat(i.url) for i in infos] == infos
    assert [i.url for i in store.find(join(root, "a"))] == [join(root, n) for n in names[:3]], (
        "a prefix ends at a slash"
    )
    assert store.find(join(root, "b.txt")) == infos[4:]
    assert store.glob(join(root, "a*", "*.tar")) == [infos[0], infos[1], infos[3]]
    assert store.glob(join(root, "a", "[2-9].tar")) == [infos[1]]
    assert store.glob(join(root, "**", "3.tar")) == [infos[2]]


def test_a_trailing_slash_names_the_same_folder(root: str) -> None:
    put(join(root, "in", "x.tar"))
    assert [i.url for i in expand(join(root, "in") + "/")] == [join(root, "in", "x.tar")]


def test_stat_open_and_read_of_a_missing_object_raise_object_missing(root: str) -> None:
    put(join(root, "other"))
    url = join(root, "absent.tar")
    for call in (store_for(root).stat, store_for(root).open, read):
        with pytest.raises(ObjectMissing, match=r"absent\.tar does not exist"):
            call(url)


def test_expand_keeps_the_order_of_the_pattern_and_of_names(root: str) -> None:
    for name in ("s-009.tar", "s-010.tar", "s-011.tar", "t/b.tar", "t/a.tar"):
        put(join(root, name))
    assert [i.url for i in expand(join(root, "s-{009..010}.tar"))] == [
        join(root, "s-009.tar"),
        join(root, "s-010.tar"),
    ]
    assert [i.url for i in expand(join(root, "{t,s-011.tar}"))] == [
        join(root, n) for n in ("t/a.tar", "t/b.tar", "s-011.tar")
    ]
    assert [i.url for i in expand(join(root, "s-*.tar"))] == [
        join(root, f"s-{n:03d}.tar") for n in (9, 10, 11)
    ]


def test_expand_refuses_what_names_no_object(root: str) -> None:
    put(join(root, "s-000.tar"))
    for pattern in ("none", "none/", "*.parquet", "s-{000..001}.tar", "{s-000.tar,s-9.tar}"):
        with pytest.raises(ObjectMissing):
            expand(join(root, pattern))


def test_expand_hides_the_marks_of_other_tools(root: str) -> None:
    for name in (
        "_DSC1.JPG",
        "a.tar",
        "_SUCCESS",
        ".crc",
        ".x.jpg",
        "_tmp/b.tar",
        "x/.hid/c.tar",
        "x/d.tar",
        "_x/e.tar",
    ):
        put(join(root, name))
    assert [i.url for i in expand(root)] == [
        join(root, name) for name in ("_DSC1.JPG", "a.tar", "x/d.tar")
    ]
    assert [i.url for i in expand(join(root, "*"))] == [
        join(root, "_DSC1.JPG"),
        join(root, "a.tar"),
    ]
    assert [i.url for i in expand(join(root, "_tmp"))] == [join(root, "_tmp/b.tar")], (
        "a hidden folder named outright is meant"
    )
    assert [i.url for i in expand(join(root, "_tmp", "*.tar"))] == [join(root, "_tmp/b.tar")]
    assert [i.url for i in expand(join(root, "_SUCCESS"))] == [join(root, "_SUCCESS")]


def test_a_glob_hides_the_same_folders_on_every_store(root: str) -> None:
    for name in ("x/.hid/c.tar", "x/_old/f.tar", "x/new/d.tar", "_x/new/e.tar"):
        put(join(root, name))
    assert [i.url for i in expand(join(root, "*", "*", "*.tar"))] == [join(root, "x/new/d.tar")]
    assert [i.url for i in expand(join(root, "**", "*.tar"))] == [join(root, "x/new/d.tar")]
    assert [i.url for i in expand(join(root, "_*", "new", "*.tar"))] == [join(root, "_x/new/e.tar")]


@pytest.mark.parametrize(
    ("pattern", "urls"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("x{,.old}", ["x", "x.old"]),
        ("{07..07}", ["07"]),
        ("{a}", ["{a}"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern: str, urls: list[str]) -> None:
    assert expand_braces(pattern) == urls


@pytest.mark.parametrize("pattern", ["{5..4}", "a-{000..1000000}.tar"])
def test_an_empty_or_endless_range_is_refused(pattern: str) -> None:
    with pytest.raises(JobError, match="empty or longer than a million"):
        expand_braces(pattern)


@given(st.integers(0, 99_999), st.integers(0, 30), st.integers(1, 6))
def test_a_range_has_every_number_once_and_keeps_its_zeros(
    first: int, more: int, width: int
) -> None:
    low, high = str(first).zfill(width), str(first + more).zfill(width)
    assert expand_braces(f"s-{{{low}..{high}}}.tar") == [
        f"s-{str(n).zfill(len(low))}.tar" for n in range(first, first + more + 1)
    ]


def test_another_scheme_is_refused() -> None:
    with pytest.raises(JobError, match=r"not gs://"):
        store_for("gs://bucket/x")


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


def test_a_find_during_deletes_still_has_what_stays(root: str) -> None:
    kept = [join(root, "d", f"kept-{n}") for n in range(5)]
    for url in kept:
        put(url)
    done = threading.Event()

    def churn() -> None:
        store, url = store_for(root), join(root, "d", "sub", "gone")
        while not done.is_set():
            store.create(url, b"x")
            store.delete([url])
            store.delete_folder(join(root, "d", "sub"))

    with ThreadPoolExecutor(4) as pool:
        churning = pool.submit(churn)
        end = time.monotonic() + 0.7
        try:
            while time.monotonic() < end:
                assert set(kept) <= {info.url for info in store_for(root).find(join(root, "d"))}
        finally:
            done.set()
        churning.result()


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


# ---- S3 alone


@pytest.fixture
def proxy(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy to the mock, which the environment points at; `proxy_root` is a bucket behind it."""
    with proxied(mock_s3) as running:
        yield running


@pytest.fixture
def proxy_root(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the back-off, not the store
    root = new_bucket(proxy.url, monkeypatch) + "/root"
    put(join(root, "there"), b"bytes that are there")
    proxy.calls.clear()
    return root


def first(failures: int, verdict: int, methods: str = "GET PUT HEAD DELETE POST") -> object:
    remaining = Counter({"n": failures})

    def rule(call: Call) -> int:
        if call.method in methods.split() and remaining["n"] > 0:
            remaining["n"] -= 1
            return verdict
        return FORWARD

    return rule


@pytest.mark.parametrize("verdict", [500, 503, 429, 408, LOSE])
def test_nine_failures_are_survived(proxy: Proxy, proxy_root: str, verdict: int) -> None:
    store, url = store_for(proxy_root), join(proxy_root, "there")
    for method, work in {
        "HEAD": lambda: store.stat(url).size == 20,
        "GET": lambda: read(url) == b"bytes that are there",
        "DELETE": lambda: store.delete([join(proxy_root, "absent")]) is None,
    }.items():
        proxy.calls.clear()
        proxy.rule = first(9, verdict, method)
        assert work()
        assert proxy.count(method) == 10


def test_a_listing_survives_failures(proxy: Proxy, proxy_root: str) -> None:
    proxy.rule = first(4, 503)
    assert [i.url for i in store_for(proxy_root).find(proxy_root)] == [join(proxy_root, "there")]
    proxy.rule = first(4, 503)
    assert [i.url for i in expand(join(proxy_root, "th*"))] == [join(proxy_root, "there")]


@pytest.mark.parametrize("verdict", [503, 409])
def test_a_create_survives_failures_before_it_arrives(
    proxy: Proxy, proxy_root: str, verdict: int
) -> None:
    url = join(proxy_root, "new")
    proxy.rule = first(3, verdict, "PUT")
    assert store_for(url).create(url, b"mine") is True
    assert read(url) == b"mine" and proxy.count("PUT", "/new") == 4


def test_a_tenth_failure_is_one_error_with_the_url(proxy: Proxy, proxy_root: str) -> None:
    proxy.rule = lambda call: 503
    store, url = store_for(proxy_root), join(proxy_root, "there")
    for method, work in {
        "HEAD": lambda: store.stat(url),
        "PUT": lambda: store.create(url, b"x"),
        "DELETE": lambda: store.delete([url]),
    }.items():
        proxy.calls.clear()
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "10 attempts", "run the same command again"
        )
        assert type(caught.value) is StorageError and len(proxy.calls) == proxy.count(method) == 10


def test_a_refusal_is_not_retried(proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "there")
    assert store_for(url).create(url, b"x") is False
    assert proxy.count("PUT") == 1
    proxy.rule = lambda call: 403
    with pytest.raises(StorageError, match="access refused"):
        store_for(url).create(url, b"x")
    assert proxy.count("PUT") == 2


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_object_that_is_refused_is_told_from_a_store_that_fails(
    proxy: Proxy, proxy_root: str, method: str
) -> None:
    proxy.rule = lambda call: 403 if call.method == method else FORWARD
    with pytest.raises(ObjectRefused, match="access refused"):
        read(join(proxy_root, "there"))
    assert proxy.count(method) == 1


def test_a_lost_answer_of_a_create_never_writes_twice(proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "lost")
    proxy.rule = first(1, LOSE, "PUT")
    assert store_for(url).create(url, b"mine") is False, "it is there: whoever asks must look"
    assert read(url) == b"mine" and proxy.count("PUT", "/lost") == 2
    assert all(call.headers["if-none-match"] == "*" for call in proxy.calls if call.method == "PUT")


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


def test_a_replaced_local_file_is_read_to_its_end(tmp_path: Path) -> None:
    url = str(tmp_path / "m.bin")
    put(url, b"a" * 3 * MIB)
    with store_for(url).open(url) as stream:
        stream.read(10)
        store_for(url).replace(url, b"b" * 3 * MIB)
        assert stream.read() == b"a" * (3 * MIB - 10)


def test_a_read_cut_short_is_tried_again(mock_s3: str, proxy: Proxy, proxy_root: str) -> None:
    url = join(proxy_root, "there")
    proxy.rule = first(2, LOSE, "GET")
    assert read(url) == b"bytes that are there"
    gets = [call for call in proxy.calls if call.method == "GET"]
    assert len(gets) == 3 and {call.headers["if-match"].strip('"') for call in gets} == {
        store_for(url).stat(url).version
    }


def test_a_store_that_is_down_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }.items():  # the discard port: refused
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    started = time.monotonic()
    for work in (
        lambda: read("s3://b/x"),
        lambda: expand("s3://b/x"),
        lambda: store_for("s3://b").create("s3://b/x", b"x"),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(caught.value, "s3://b/x", "127.0.0.1:9")
    assert time.monotonic() - started < 30


def test_the_back_off_grows_and_ends(
    proxy: Proxy, proxy_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    proxy.rule = lambda call: 503
    with pytest.raises(StorageError):
        store_for(proxy_root).stat(join(proxy_root, "there"))
    assert len(slept) == 9 and all(0 <= s <= min(8.0, 0.1 * 2**n) for n, s in enumerate(slept))


def test_a_store_that_ignores_the_condition_is_refused(proxy: Proxy, proxy_root: str) -> None:
    proxy.drop_headers = frozenset({"if-none-match"})
    with pytest.raises(UnsafeStore) as caught:
        check_store(proxy_root)
    require_one_line_with_next_step(
        caught.value, proxy_root, "If-None-Match", "Use a store that honours it"
    )
    assert below(proxy_root) == ["there"]


@pytest.mark.s3
def test_wrong_keys_are_one_error_and_not_retried(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(join(s3, "x"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for kind, work in (
        (ObjectRefused, lambda: read(join(s3, "x"))),  # a HEAD, to which S3 says 403 and no more
        (StorageError, lambda: store_for(s3).create(join(s3, "y"), b"")),
        (StorageError, lambda: expand(s3)),
        (StorageError, lambda: expand(join(s3, "*"))),
        (StorageError, lambda: store_for(s3).delete([join(s3, "x")])),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, s3, "access refused", "Check AWS_PROFILE or AWS_ACCESS_KEY_ID"
        )
        assert type(caught.value) is kind
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["AWS_SECRET_ACCESS_KEY"])
    assert read(join(s3, "x")) == b"x"


def test_no_keys_at_all_are_one_error(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KEYS:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", mock_s3)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    with pytest.raises(StorageError) as caught:
        store_for("s3://b").create("s3://b/x", b"x")
    require_one_line_with_next_step(caught.value, "s3://b/x", "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("kind", ["mock", pytest.param("real", marks=pytest.mark.s3)])
def test_a_missing_bucket_is_one_error(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_bucket(request.getfixturevalue(f"{kind}_s3"), monkeypatch)
    url = f"s3://never-{uuid.uuid4().hex[:8]}"
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for work in (
        lambda: store_for(url).create(join(url, "x"), b""),
        lambda: store_for(url).replace(join(url, "x"), b""),
        lambda: expand(join(url, "x")),
        lambda: expand(join(url, "*.tar")),
        lambda: store_for(url).find(url),
        lambda: store_for(url).stat(join(url, "x")),
        lambda: store_for(url).open(join(url, "x")),
        lambda: exists(join(url, "x")),
        lambda: check_store(join(url, "out")),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "bucket does not exist", "Check its name"
        )
        assert type(caught.value) is StorageError


def test_a_bucket_that_may_not_be_asked_for_is_no_missing_one(
    proxy: Proxy, proxy_root: str
) -> None:
    """A policy can allow a prefix and refuse HEAD on its bucket."""
    proxy.rule = lambda call: (
        403 if call.method == "HEAD" and call.path.count("/") == 1 else FORWARD
    )
    assert store_for(proxy_root).find(join(proxy_root, "none")) == [] and not exists(
        join(proxy_root, "none")
    )
    assert store_for(proxy_root).glob(join(proxy_root, "none*")) == [] and proxy.count("HEAD") >= 3
    proxy.rule = lambda call: 403 if call.method == "GET" else FORWARD
    for work in (
        lambda: store_for(proxy_root).find(proxy_root),
        lambda: expand(join(proxy_root, "*")),
    ):
        with pytest.raises(StorageError, match="access refused"):
            work()


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "endpoint", ["127.0.0.1:9000", "localhost:9000", "minio", "http://", "ftp://h:1", "http://h h"]
)
def test_an_endpoint_without_its_scheme_is_a_bad_job(
    name: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        name: endpoint,
    }.items():
        monkeypatch.setenv(variable, value)
    for work in (lambda: read("s3://b/x"), lambda: expand("s3://b/*")):
        with pytest.raises(JobError) as caught:
            work()
        assert (
            str(caught.value) == f"{name} is {endpoint!r}: write http://host:port or https://host."
        )


def test_an_unknown_profile_is_one_error(
    mock_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_bucket(mock_s3, monkeypatch)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("retried"))
    for work in (
        lambda: expand(url),
        lambda: read(join(url, "x")),
        lambda: store_for(url).create(join(url, "x"), b""),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, url, "(nobody)", "Check ~/.aws/config, or unset AWS_PROFILE."
        )
    (tmp_path / "config").write_text("no section\n[x")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(StorageError) as caught:
        expand(url)
    require_one_line_with_next_step(
        caught.value, url, "Unable to parse config file", "Check ~/.aws/config"
    )


def test_another_account_is_another_client(mock_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_bucket(mock_s3, monkeypatch)
    first = store_for(url)
    assert store_for(url) is first
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, "another")
        assert store_for(url) is not first
        first = store_for(url)


@pytest.mark.s3
def test_a_create_of_110_mb_is_one_put_and_conditional(s3: str) -> None:
    data, url = os.urandom(MIB) * 110, join(s3, "big.parquet")
    assert store_for(url).create(url, data, {"vitray-sha256": "ab"}) is True
    head = client().head_object(Bucket=s3.removeprefix("s3://"), Key="big.parquet")
    assert head["ETag"].strip('"') == hashlib.md5(data).hexdigest(), (
        "the etag of a multipart upload would be another"
    )
    assert head["ContentLength"] == len(data) and head["Metadata"] == {"vitray-sha256": "ab"}
    assert store_for(url).create(url, bytes(len(data))) is False
    assert store_for(url).stat(url).version == hashlib.md5(data).hexdigest()
    store_for(url).delete([url])


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


# ---- a local disk alone


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mount is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    store = store_for(str(small_disk))
    put(str(small_disk / "old"), b"o" * 1000)
    for work in (
        lambda: store.create(str(small_disk / "new"), bytes(2 * MIB)),
        lambda: store.replace(str(small_disk / "old"), bytes(2 * MIB)),
    ):
        with pytest.raises(StorageError) as caught:
            work()
        require_one_line_with_next_step(
            caught.value, str(small_disk), "The disk is full", "run the same command again"
        )
    assert below(str(small_disk)) == ["old"] and read(str(small_disk / "old")) == b"o" * 1000
    assert store.create(str(small_disk / "new"), b"small enough") is True


def test_a_read_only_disk_is_one_error(small_disk: Path) -> None:
    put(str(small_disk / "old"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = store_for(str(small_disk))
    for work in (
        lambda: store.create(str(small_disk / "new"), b"x"),
        lambda: store.delete([str(small_disk / "old")]),
    ):
        with pytest.raises(StorageError, match=r"read-only: choose another `out`\.$"):
            work()
    assert read(str(small_disk / "old")) == b"x"


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
            assert type(caught.value) is StorageError
            require_one_line_with_next_step(caught.value, url)
        assert not exists(url)


def test_a_folder_is_no_object(root: str) -> None:
    put(join(root, "folder", "x"))
    assert not exists(join(root, "folder"))
    with pytest.raises(ObjectMissing):
        store_for(root).open(join(root, "folder"))


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


@pytest.mark.parametrize("name", ["photos [2020]", "what?", "a*b"])
def test_a_local_name_that_is_there_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "1.jpg").write_bytes(b"1")
    assert (
        [info.url for info in expand(str(folder))]
        == [info.url for info in expand(f"{folder}/1.jpg")]
        == [f"{folder}/1.jpg"]
    )
    assert reads(str(folder), f"{folder}/out") and not reads(str(folder), f"{tmp_path}/out")
    with pytest.raises(ObjectMissing, match=r"names no object$"):
        expand(f"{folder}x")
    with pytest.raises(
        ObjectMissing,
        match=r"names no object \(\* matches within one folder: give the folder, or "
        r"/\*\*\)$",
    ):
        expand(f"{tmp_path}/*")
