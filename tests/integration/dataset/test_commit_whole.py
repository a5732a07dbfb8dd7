"""A shard whose rows are all in memory is committed without staging, as its fragments would be."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from support.dataset_parts import (
    FACTS,
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
from support.s3 import new_bucket
from support.s3_proxy import FORWARD, LOSE, Proxy
from vitray.dataset import (
    Commit,
    Dataset,
    commit_shard,
    commit_whole,
    committed_files,
    find_commit,
    read_footer,
    removed_keys,
    uncommitted,
    write_end,
    write_fragment,
)
from vitray.errors import CommitError, ObjectChanged, StorageError
from vitray.schema import End, Shard
from vitray.storage import read as read_object
from vitray.storage import store_for

EMPTY = {3: "empty"}


def whole(
    dataset: Dataset,
    shard: Shard,
    total: int = 9,
    bad: Bad | None = None,
    end: End | None = None,
    **options: Any,
) -> Commit:
    bad = bad or {}
    rows = rows_of(dataset, shard.id, [i for i in range(total) if i not in bad])
    errors = errors_of(shard.id, bad)
    return commit_whole(dataset, shard, rows, errors, end or End(total), **options)


@pytest.fixture
def one_write_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex="0" * 32))


@pytest.fixture
def counted(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Dataset, Shard, Callable[[], list[str]]]]:
    """A dataset and a shard on S3, and the requests since the last look, as METHOD folder."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    out = new_bucket(proxy.url, monkeypatch) + "/out"

    def requests() -> list[str]:
        lines = [f"{call.method} {folder_of(call.path)}" for call in proxy.calls]
        proxy.calls.clear()
        return lines

    def begin() -> tuple[Dataset, Shard, Callable[[], list[str]]]:
        dataset, shard = make(out), input_shard(out)
        requests()
        return dataset, shard, requests

    return begin


def folder_of(path: str) -> str:
    for name in ("staging", "data/", "_errors", "/in/", "removed"):
        if name in path:
            return f"list {name}" if "list-type" in path else name
    return "bucket"


@pytest.mark.parametrize(
    ("total", "bad"),
    [(0, {}), (4, {}), (9, EMPTY), (5, dict.fromkeys(range(5), "empty"))],
    ids=["no rows", "one fragment", "three fragments", "all bad"],
)
def test_the_file_is_that_of_staged_fragments(
    out: str, one_write_id: None, total: int, bad: Bad
) -> None:
    dataset, shard = make(out), input_shard(out)
    by_staging = commit(dataset, shard, total, bad)
    expected = (data_table(dataset, shard), read_footer(dataset.data_url(shard.id)))
    error_rows = error_table(dataset, shard) if bad else None
    store_for(out).delete([dataset.data_url(shard.id), dataset.errors_url(shard.id)])
    assert whole(dataset, shard, total, bad) == by_staging
    table = data_table(dataset, shard)
    assert table.schema.equals(expected[0].schema, check_metadata=True)
    assert table.to_pylist() == expected[0].to_pylist()
    assert read_footer(dataset.data_url(shard.id)) == expected[1]
    assert bad == {} or error_table(dataset, shard).equals(error_rows)


@pytest.mark.parametrize("total", [0, 4])
def test_the_bytes_are_those_of_one_staged_fragment(
    local_out: str, one_write_id: None, total: int
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    commit(dataset, shard, total)
    expected = read_object(dataset.data_url(shard.id))
    store_for(local_out).delete([dataset.data_url(shard.id)])
    whole(dataset, shard, total)
    assert read_object(dataset.data_url(shard.id)) == expected


def test_what_is_left_out_and_a_cut_are_added_as_in_staging(
    local_out: str, one_write_id: None
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    end = End(4, 4096, "", {"filtered": 2, "hidden": 1}, {"jpg": 4})
    rows, errors = rows_of(dataset, shard.id, range(4)), errors_of(shard.id, {})
    write_fragment(dataset, shard.id, (0, 4), rows, errors, {"filtered": 3})
    write_end(dataset, shard.id, end)
    commit_shard(dataset, shard)
    expected = read_object(dataset.data_url(shard.id))
    store_for(local_out).delete([dataset.data_url(shard.id)])
    done = whole(dataset, shard, 4, end=end, left_out={"filtered": 3})
    footer = read_footer(dataset.data_url(shard.id))
    assert footer.left_out == {"filtered": 5, "hidden": 1}
    assert (done.truncated_at, footer.image_members) == (4096, {"jpg": 4})
    assert read_object(dataset.data_url(shard.id)) == expected


@pytest.mark.parametrize(("indexes", "bad"), [([0, 1], {}), ([0, 1, 2], EMPTY), ([1, 0, 2], {})])
def test_rows_that_do_not_make_up_the_shard_are_refused(
    local_out: str, indexes: list[int], bad: Bad
) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    rows, errors = rows_of(dataset, shard.id, indexes), errors_of(shard.id, bad)
    with pytest.raises(ValueError, match=r"do not make up \(0, 3\)"):
        commit_whole(dataset, shard, rows, errors, End(3))
    assert committed_files(local_out) == {}


def test_a_whole_commit_takes_three_requests_and_one_more_for_errors(
    counted: Callable[[], Any],
) -> None:
    """The last one looks for keys that were removed meanwhile."""
    dataset, shard, requests = counted()
    removed_keys(dataset.out)  # which a thread remembers
    requests()
    whole(dataset, shard)
    assert requests() == ["HEAD /in/", "PUT data/", "GET list removed"]
    store_for(dataset.out).delete([dataset.data_url(shard.id)])
    requests()
    whole(dataset, shard, bad=EMPTY)
    assert requests() == ["HEAD /in/", "PUT data/", "PUT _errors", "GET list removed"]


def test_a_staged_commit_looks_for_a_data_file_only_when_it_has_to(
    counted: Callable[[], Any],
) -> None:
    dataset, shard, requests = counted()
    stage(dataset, shard, 8)
    requests()
    commit_shard(dataset, shard)
    names = [name for name in requests() if "staging" not in name]
    assert names == ["HEAD /in/", "PUT data/", "GET list removed"]


def test_a_refused_create_adopts_the_first_file(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    first = whole(dataset, shard, bad=EMPTY)
    files = stored(out)
    store_for(out).delete([dataset.errors_url(shard.id)])
    assert whole(dataset, shard) == replace(first, adopted=True)
    assert stored(out)[f"data/{shard.id}.parquet"] == files[f"data/{shard.id}.parquet"]
    assert error_table(dataset, shard).equals(errors_of(shard.id, EMPTY)), "repaired"


def test_eight_runs_commit_one_object_with_and_without_staging(out: str) -> None:
    dataset, shard = make(out), input_shard(out)
    stage(dataset, shard, 9, EMPTY)
    gate = threading.Barrier(8)

    def run(number: int) -> Commit | None:
        gate.wait()
        if number % 2:
            return commit_shard(dataset, shard)
        return whole(dataset, shard, bad=EMPTY, staged=True)

    with ThreadPoolExecutor(8) as pool:
        commits = list(pool.map(run, range(8)))
    assert [c for c in commits if c is None] == []
    assert sum(not c.adopted for c in commits if c) == 1
    assert {(c.rows, c.errors) for c in commits if c} == {(8, 1)}
    assert data_table(dataset, shard)["index"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert staging(dataset) == []


def test_staging_stays_unless_the_caller_says_that_it_exists(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage(dataset, shard, 9)
    whole(dataset, shard)
    assert len(staging(dataset)) == 4
    assert whole(dataset, shard, staged=True).adopted
    assert staging(dataset) == []


def test_a_lost_answer_is_a_commit(counted: Callable[[], Any], proxy: Proxy) -> None:
    dataset, shard, _ = counted()
    answers = iter([LOSE])
    proxy.rule = lambda call: (
        next(answers, FORWARD) if call.method == "PUT" and "/data/" in call.path else FORWARD
    )
    assert whole(dataset, shard, bad=EMPTY) == Commit(shard.id, 8, 1, {"empty": 1}, None, False)


def test_a_create_that_never_arrives_is_an_error(counted: Callable[[], Any], proxy: Proxy) -> None:
    dataset, shard, _ = counted()
    proxy.rule = lambda call: 503 if call.method == "PUT" and "/data/" in call.path else FORWARD
    with pytest.raises(StorageError, match="no answer in 10 attempts"):
        whole(dataset, shard)
    assert committed_files(dataset.out) == {}


def test_another_total_or_another_job_is_an_error(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    whole(dataset, shard, 9)
    with pytest.raises(CommitError, match=r"committed 9 images .*this one saw 8"):
        whole(dataset, shard, 8)
    other = replace(dataset, spec=replace(FACTS, precision="bf16"))
    with pytest.raises(CommitError, match="exists with fingerprint"):
        whole(other, shard, 9)


def test_commits_are_found_one_by_one(quick_out: str) -> None:
    dataset, cats, dogs = make(quick_out), input_shard(quick_out), input_shard(quick_out, "dogs")
    first = whole(dataset, cats, bad=EMPTY)
    assert find_commit(dataset, cats.id) == replace(first, adopted=True)
    assert find_commit(dataset, dogs.id) is None
    assert uncommitted(dataset, [dogs.id, cats.id]) == [dogs.id]
    assert uncommitted(dataset, []) == []


@pytest.mark.parametrize("by_staging", [False, True])
def test_a_changed_input_is_not_committed_and_an_older_commit_counts(
    quick_out: str, by_staging: bool
) -> None:
    dataset, shard, later = make(quick_out), input_shard(quick_out), input_shard(quick_out, "dogs")
    first = whole(dataset, shard)

    def again(shard: Shard) -> Commit | None:
        if not by_staging:
            return whole(dataset, shard)
        stage(dataset, shard, 9)
        return commit_shard(dataset, shard)

    for changed in (shard, later):
        store_for(quick_out).replace(changed.url, b"another body, another length")
    assert again(shard) == replace(first, adopted=True)
    with pytest.raises(ObjectChanged, match=r"dogs\.tar"):
        again(later)
    assert list(committed_files(quick_out)) == [shard.id]
