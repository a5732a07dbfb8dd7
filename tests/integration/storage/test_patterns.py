"""Globs, braces and ranges name the same objects on every store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.stores import put
from vitray.errors import ObjectMissing
from vitray.storage import expand, join, store_for


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
