"""Runs that commit the same shard at once, die on the way, or get no answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import boto3
import pytest

from support.dataset_parts import (
    Bad,
    commit,
    data_table,
    error_table,
    errors_of,
    input_shard,
    make,
    rows_of,
    stage,
    staging,
    stored,
)
from support.s3_proxy import FORWARD, LOSE, Call, Proxy
from vitray.dataset import (
    Commit,
    Dataset,
    commit_shard,
    committed_files,
    list_staged,
    write_fragment,
)
from vitray.errors import CommitError, StorageError
from vitray.schema import Shard
from vitray.storage import read as read_object
from vitray.storage import store_for


def test_eight_runs_commit_one_object(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 9, {3: "empty"})
    gate = threading.Barrier(8)

    def run(_: int) -> Commit | None:
        gate.wait()
        return commit_shard(dataset, shard)

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(run, range(8)))
    commits = [c for c in done if c is not None]
    assert len(commits) == 8, "the file exists: nobody may plan the shard again"
    assert sum(not c.adopted for c in commits) == 1
    assert {(c.rows, c.errors) for c in commits} == {(8, 1)}
    assert sorted(stored(out)) == [
        f"_errors/{shard.id}.parquet",
        "_vitray/dataset.json",
        f"data/{shard.id}.parquet",
    ]
    assert data_table(dataset, shard)["index"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 8]


def once(matches: Callable[[Call], bool], event: Callable[[], None]) -> Callable[[Call], int]:
    """A rule: before the first call that matches is forwarded, something happens."""
    waiting = [event]

    def rule(call: Call) -> int:
        if waiting and matches(call):
            waiting.pop()()
        return FORWARD

    return rule


def rival(
    proxy: Proxy,
    mock_s3: str,
    dataset: Dataset,
    shard: Shard,
    total: int = 9,
    bad: Bad | None = None,
) -> Callable[[], None]:
    """Another run: commits the shard with boto3's bytes of a commit made elsewhere, then cleans up,
    past the proxy.
    """
    bucket, _, prefix = dataset.out.removeprefix("s3://").partition("/")
    client = boto3.client("s3", endpoint_url=mock_s3)

    def body() -> bytes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            copy = replace(dataset, out=folder)
            stage(copy, shard, total, {3: "empty"} if bad is None else bad)
            commit_shard(copy, shard)
            return read_object(copy.data_url(shard.id))

    result = body()

    def act() -> None:
        client.put_object(
            Bucket=bucket, Key=f"{prefix}/data/{shard.id}.parquet", Body=result, IfNoneMatch="*"
        )
        listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/_vitray/staging/").get(
            "Contents", []
        )
        for item in listed:
            client.delete_object(Bucket=bucket, Key=item["Key"])

    return act


WINDOWS: dict[str, Callable[[Call], bool]] = {
    "before the staging is listed": lambda call: (
        call.method == "GET" and "staging" in call.path and "list-type" in call.path
    ),
    "before the end is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("end-9.arrow")
    ),
    "before the first fragment is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("0000000004.arrow")
    ),
    "before the last fragment is read": lambda call: (
        call.method in ("GET", "HEAD") and call.path.endswith("0000000009.arrow")
    ),
    "before the input is looked at": lambda call: (
        call.method == "HEAD" and call.path.endswith("cats.tar")
    ),
    "before the create": lambda call: call.method == "PUT" and "/data/" in call.path,
}


@pytest.mark.parametrize("window", WINDOWS)
def test_a_run_that_is_overtaken_adopts(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str, window: str
) -> None:
    dataset, shard = behind()
    act = rival(proxy, mock_s3, dataset, shard)
    proxy.rule = once(WINDOWS[window], act)
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, True)
    assert sorted(stored(dataset.out)) == [
        f"_errors/{shard.id}.parquet",
        "_vitray/dataset.json",
        f"data/{shard.id}.parquet",
    ]


def test_an_overtaking_run_that_saw_another_total_is_an_error(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str
) -> None:
    dataset, shard = behind()
    proxy.rule = once(WINDOWS["before the create"], rival(proxy, mock_s3, dataset, shard, total=10))
    with pytest.raises(
        CommitError, match=rf"committed 10 images .*this one saw 9 .*vitray redo --shard {shard.id}"
    ):
        commit_shard(dataset, shard)


def test_an_overtaking_run_that_judged_an_image_otherwise_is_adopted_with_a_warning(
    behind: Callable[[], Any], proxy: Proxy, mock_s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, shard = behind()
    proxy.rule = once(
        WINDOWS["before the create"],
        rival(proxy, mock_s3, dataset, shard, bad={3: "empty", 4: "time_limit"}),
    )
    with caplog.at_level(logging.WARNING, logger="vitray"):
        done = commit_shard(dataset, shard)
    assert done == Commit(shard.id, 7, 2, {"empty": 1, "time_limit": 1}, None, True)
    assert (
        f"{shard.id}: another run committed 2 errors, this one saw 1; the first stays"
        in caplog.text
    )
    assert error_table(dataset, shard)["index"].to_pylist() == [3, 4]


def test_a_commit_whose_answer_is_lost_knows_its_own(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    answers = iter([LOSE])
    proxy.rule = lambda call: (
        next(answers, FORWARD) if WINDOWS["before the create"](call) else FORWARD
    )
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, False)
    assert proxy.count("PUT", "/data/") == 2


def test_a_commit_that_is_never_answered_looks_before_it_gives_up(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    proxy.rule = lambda call: LOSE if WINDOWS["before the "
        "create"](call) and proxy.count("PUT", "/data/") == 1 else (
        503 if WINDOWS["before the create"](call) else FORWARD
    )  # fmt: skip
    assert commit_shard(dataset, shard) == Commit(shard.id, 8, 1, {"empty": 1}, None, False)
    assert proxy.count("PUT", "/data/") in (10, 11), (
        "aiohttp repeats a PUT by itself when a kept connection drops"
    )


def test_a_commit_that_never_arrives_is_an_error_and_keeps_its_staging(
    behind: Callable[[], Any], proxy: Proxy
) -> None:
    dataset, shard = behind()
    proxy.rule = lambda call: 503 if WINDOWS["before the create"](call) else FORWARD
    with pytest.raises(StorageError, match=r"data/cats.*no answer in 10 attempts"):
        commit_shard(dataset, shard)
    assert list_staged(dataset, shard.id).covers() and committed_files(dataset.out) == {}
    proxy.rule = lambda call: FORWARD
    done = commit_shard(dataset, shard)
    assert done is not None and not done.adopted


def test_a_crash_before_errors_is_repaired_by_the_next_commit(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    first = commit(dataset, shard, 6, {1: "empty"})
    store_for(quick_out).delete([dataset.errors_url(shard.id)])
    stage(dataset, shard, 6, {1: "empty"})
    assert commit_shard(dataset, shard) == replace(first, adopted=True)
    assert (
        error_table(dataset, shard).equals(errors_of(shard.id, {1: "empty"}))
        and staging(dataset) == []
    )


def test_a_crash_before_clean_up_is_repaired_by_the_next_commit(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    commit(dataset, shard, 6, {1: "empty"})
    write_fragment(
        dataset, shard.id, (4, 6), rows_of(dataset, shard.id, [4, 5]), errors_of(shard.id, {})
    )
    done = commit_shard(dataset, shard)
    assert done is not None and done.adopted and staging(dataset) == []
