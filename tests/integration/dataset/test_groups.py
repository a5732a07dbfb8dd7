"""A path is in one group of loose files, whichever runs append."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from support.dataset_parts import names_of
from vitray.dataset import NO_GROUP, append_group_log, load_group_log
from vitray.storage import join


def test_a_path_is_in_one_group_for_ever(out: str) -> None:
    assert load_group_log(out) == []
    members, rivals = [(0, "s3://b/a"), (0, "s3://b/b")], [(0, "s3://b/b"), (0, "s3://b/c")]
    assert append_group_log(out, members) is True
    assert append_group_log(out, rivals) is False, "planned before the first append was read"
    assert append_group_log(out, [(0, "s3://b/z")]) is False, "groups never grow"
    assert append_group_log(out, [(1, "s3://b/a")]) is False
    assert load_group_log(out) == members
    assert append_group_log(out, [(1, "s3://b/c")]) is True
    assert load_group_log(out) == [*members, (1, "s3://b/c")]
    assert names_of(out, "shards/") == [
        "_vitray/shards/000000.parquet",
        "_vitray/shards/000001.parquet",
    ]


def test_a_path_leaves_its_group_once_and_may_enter_another(out: str) -> None:
    log = [(0, "a"), (0, "b"), (NO_GROUP, "a"), (1, "a"), (1, "c")]
    for members in (log[:2], log[2:3], log[3:]):
        assert append_group_log(out, members) is True
    for refused in ([(NO_GROUP, "x")], [(2, "a")], [(0, "x")], [(NO_GROUP, "b"), (NO_GROUP, "b")]):
        assert append_group_log(out, refused) is False, refused
    assert append_group_log(out, [(NO_GROUP, "a"), (NO_GROUP, "b")]) is True
    assert append_group_log(out, [(1, "a")]) is False, "groups never grow"
    log += [(NO_GROUP, "a"), (NO_GROUP, "b")]
    assert load_group_log(out) == log
    copy = join(out, "copy")
    assert append_group_log(copy, log) is True and load_group_log(copy) == log, (
        "as backfill and relabel do"
    )


def test_of_eight_appends_at_once_one_is_accepted(out: str) -> None:
    gate = threading.Barrier(8)

    def append(n: int) -> bool:
        gate.wait()
        return append_group_log(out, [(0, f"s3://b/{n}")])

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(append, range(8)))
    assert won.count(True) == 1 and load_group_log(out) == [(0, f"s3://b/{won.index(True)}")]
