"""The commit protocol, explored: runs of the real code on one store, in every order within bounds,
while calls and processes fail.

After every execution a run without faults comes, and then each image must have its row, once, in a
dataset that is whole. Mutants of the protocol, each a mistake that somebody could make, must all be
caught by the same exploration.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from explorer import (
    ANSWER_LOST,
    ANSWER_LOST_THEN_REFUSED,
    Bounds,
    Died,
    Found,
    MemoryStore,
    Run,
    Scenario,
    Violation,
    explore,
)
from test_dataset import errors_of, make, rows_of, vector

from vitray.dataset import (
    NO_GROUP,
    Commit,
    append_group_log,
    commit_shard,
    committed,
    finish,
    identity,
    load_group_log,
    read_footer,
    read_manifest,
    staged_intact,
    staged_shards,
    write_end,
    write_fragment,
)
from vitray.dataset import commit as protocol
from vitray.errors import FingerprintError, ObjectChanged, StorageError
from vitray.schema import End, Shard, short_hash
from vitray.storage import exists, join, store_for, stores

OUT, SOURCE = "s3://b/out", "s3://b/in/cats.tar"
SPANS, TOTAL = ((0, 2), (2, 3)), 3
NIGHTLY = pytest.mark.nightly

_now = SimpleNamespace(store=MemoryStore())
_who = threading.local()


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is the store of the execution at hand, and write-ids follow from who writes: a repeated
    execution is the same.
    """
    monkeypatch.setattr(stores, "s3_store", lambda *_: _now.store)
    monkeypatch.setattr(protocol.uuid, "uuid4", lambda: SimpleNamespace(hex=_write_id()))
    monkeypatch.setattr(
        identity, "version", cache(identity.version)
    )  # read thousands of times, most of the time that this took


def _write_id() -> str:
    _who.writes = getattr(_who, "writes", 0) + 1
    return f"{getattr(_who, 'name', 'last')}-{_who.writes}"


def planned() -> Shard:
    info = store_for(SOURCE).stat(SOURCE)
    return Shard(
        f"cats-{short_hash(SOURCE)}-{short_hash(info.version, 8)}",
        "tar",
        SOURCE,
        info.size,
        info.version,
    )


def _id_of(source: bytes) -> str:
    return f"cats-{short_hash(SOURCE)}-{short_hash(hashlib.md5(source).hexdigest(), 8)}"


def listed() -> tuple[list[str], list[str]]:
    return [planned().id], [planned().id]


def a_run(
    name: str, bad: dict[int, str] | None = None, drift: float = 0.0
) -> Callable[[], Commit | None]:
    """What a run does with one shard. bad: the images it cannot decode; drift: what its vectors
    differ by from another's.
    """

    def work() -> Commit | None:
        _who.name, done = name, None
        for _ in range(3):
            shard = planned()
            if shard.id not in committed(OUT):
                done = _make(shard, bad or {}, drift)
            if shard.id in committed(OUT):
                finish(_now.dataset, listed)
                return done
        raise StorageError("set aside after 3 attempts")

    return work


def _make(shard: Shard, bad: dict[int, str], drift: float) -> Commit | None:
    dataset, parts = _now.dataset, staged_intact(_now.dataset, shard.id)
    if not parts.covers():
        for start, stop in SPANS:
            if parts.fragments.get(start) != stop:
                rows = rows_of(dataset, shard.id, [i for i in range(start, stop) if i not in bad])
                vectors = np.array(
                    [vector(i) + np.float32(drift) for i in rows["index"].to_pylist()], np.float32
                ).ravel()
                column = pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors), type=rows.schema.field("embedding").type
                )
                rows = rows.set_column(
                    rows.schema.get_field_index("embedding"), rows.schema.field("embedding"), column
                )
                wrong = errors_of(shard.id, {i: bad[i] for i in range(start, stop) if i in bad})
                write_fragment(dataset, shard.id, (start, stop), rows, wrong)
        write_end(dataset, shard.id, End(TOTAL, None))
    try:
        return commit_shard(dataset, shard)
    except ObjectChanged:
        return None


def a_commit_task(name: str) -> Callable[[], Commit | None]:
    """A task on a machine that has lost its driver: it works on whatever is staged."""

    def work() -> Commit | None:
        _who.name = name
        return commit_shard(_now.dataset, planned())

    return work


def the_input_changes() -> None:
    store_for(SOURCE).replace(SOURCE, b"another tar")


# ---- what must hold


def broken_by(url: str, old: bytes | None, new: bytes | None) -> str:
    """The promise that a change of one object breaks, at that instant."""
    objects = _now.store.objects
    folder, _, name = url.removeprefix(f"{OUT}/").partition("/")
    data = join(OUT, "data", name)
    if folder == "data" and old is not None and new is not None:
        return f"{url} was written a second time"
    if folder == "data" and new is None and name == f"{_id_of(_now.store.objects[SOURCE])}.parquet":
        return f"{url} was deleted, and it is what the input holds now"
    if (
        folder == "data"
        and new is None
        and not any(o.startswith(f"{OUT}/data/") and o != url for o in objects)
    ):
        return f"{url} was deleted, and nothing superseded it"
    if (
        folder == "_errors"
        and new is not None
        and data not in objects
        and name == f"{_id_of(objects[SOURCE])}.parquet"
    ):
        return f"{url} was written before its data file"
    if name.startswith("staging/") and old is not None:
        if new is not None:
            return f"{url} was written a second time"
        shard = name.split("/")[1]
        if join(OUT, "data", f"{shard}.parquet") not in objects and shard == _id_of(
            objects[SOURCE]
        ):
            return f"{url} was deleted before its data file was there"
    if (
        folder == "_SUCCESS.json"
        and new is not None
        and not any(o.startswith(f"{OUT}/data/") for o in objects)
    ):
        return "_SUCCESS.json was written before the data"
    return ""


def check_whole(store: MemoryStore, runs: list[Run]) -> None:
    """No false failure, no false answer; and after one more run, without faults, the dataset is
    whole.
    """
    for run in runs:
        lost = [
            met
            for met in run.met
            if met[0] not in (ANSWER_LOST, ANSWER_LOST_THEN_REFUSED) or "create" not in met[1]
        ]
        if (
            run.error is not None
            and not isinstance(run.error, Died)
            and (not run.met or not isinstance(run.error, StorageError))
        ):
            raise Violation(f"a run failed without a cause: {run.error!r}, {run.met}")
        if (
            isinstance(run.error, StorageError)
            and not lost
            and all("/data/" in what for _, what in run.met)
        ):
            raise Violation(f"a commit that happened was called a failure: {run.error!r}")
        if (
            isinstance(run.result, Commit)
            and join(OUT, "data", f"{run.result.shard}.parquet") in store.objects
        ):
            footer = read_footer(join(OUT, "data", f"{run.result.shard}.parquet"))
            if (run.result.rows, run.result.errors) != (footer.rows, footer.errors):
                raise Violation(
                    f"a run reports {run.result}, the file holds {footer.rows} rows and "
                    f"{footer.errors} errors"
                )
    a_run("last")()
    shard, data = planned(), committed(OUT)
    if list(data) != [shard.id]:
        raise Violation(f"data/ holds {list(data)}, the input is {shard.id}")
    footer = read_footer(data[shard.id].url)
    table = pq.ParquetFile(pa.BufferReader(store.objects[data[shard.id].url])).read()
    seen = sorted(table["index"].to_pylist() + footer.error_rows["index"].to_pylist())
    if seen != list(range(TOTAL)) or (table.num_rows, footer.error_rows.num_rows) != (
        footer.rows,
        footer.errors,
    ):
        raise Violation(f"the rows are {seen}, the footer says {footer.rows} + {footer.errors}")
    errors = join(OUT, "_errors", f"{shard.id}.parquet")
    if exists(errors) != bool(footer.errors):
        raise Violation(
            f"{footer.errors} errors, but errors/ is {'there' if exists(errors) else 'not there'}"
        )
    if footer.errors and pq.read_table(pa.BufferReader(store.objects[errors])) != footer.error_rows:
        raise Violation("errors/ is not what the data file carries")
    if foreign := [
        url for url in store.objects if url.startswith(join(OUT, "_errors", "")) and url != errors
    ]:
        raise Violation(f"errors/ holds {foreign}, the input is {shard.id}")
    manifest = read_manifest(OUT)
    if (
        manifest is None
        or manifest["etag"].to_pylist() != [data[shard.id].version]
        or not exists(join(OUT, "_SUCCESS.json"))
    ):
        raise Violation(f"the manifest is {manifest and manifest.to_pylist()}")
    if shard.id in staged_shards(
        _now.dataset
    ):  # of an older version, a run that was left behind may write some at any time
        raise Violation(f"staging is left: {staged_shards(_now.dataset)}")


def scenario(runs: Callable[[], list[Callable[[], Any]]]) -> Scenario:
    _now.store = MemoryStore()
    _now.dataset = make(OUT, fragment_rows=SPANS[0][1])
    store_for(SOURCE).replace(SOURCE, b"a tar")
    at_first = dict(_now.store.objects)

    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        _now.store = MemoryStore()
        _now.store.objects, _now.store.watch = dict(at_first), broken_by
        return _now.store, runs()

    return Scenario(begin, check_whole)


SCENARIOS: dict[str, Callable[[], list[Callable[[], Any]]]] = {
    "two runs whose vectors differ in the last float": lambda: [a_run("a"), a_run("b", drift=1e-7)],
    "two runs that disagree on a bad row": lambda: [a_run("a"), a_run("b", {1: "time_limit"})],
    "two runs, and the input changes": lambda: [
        a_run("a"),
        a_run("b", {2: "truncated"}),
        the_input_changes,
    ],
    "a commit task left behind": lambda: [
        a_run("a"),
        a_run("b", {1: "time_limit"}),
        a_commit_task("left"),
    ],
    "three runs that disagree": lambda: [
        a_run("a"),
        a_run("b", {1: "time_limit"}),
        a_run("c", {0: "decoder_died", 1: "empty"}),
    ],
}


def tell(name: str, result: Found) -> None:
    print(
        f"{name}: {result.states:,} states, {result.executions:,} executions, {result.ends:,} ends, "
        f"complete: {result.complete}"
    )


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_and_no_fault_breaks_a_promise(name: str) -> None:
    result = explore(scenario(SCENARIOS[name]), Bounds(preemptions=2, faults=1, states=1500))
    tell(name, result)
    assert result.ends >= 30


@NIGHTLY
@pytest.mark.parametrize("faults", [0, 1, 2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_many_states_hold(name: str, faults: int) -> None:
    result = explore(scenario(SCENARIOS[name]), Bounds(preemptions=3, faults=faults, states=20_000))
    tell(f"{name}, {faults} faults", result)


@NIGHTLY
@pytest.mark.timeout(900)
def test_every_order_of_two_runs_and_a_changing_input_holds() -> None:
    """With at most two preemptions and no fault, all of them."""
    result = explore(
        scenario(SCENARIOS["two runs, and the input changes"]),
        Bounds(preemptions=2, faults=0, states=200_000),
    )
    tell("two runs, and the input changes", result)
    assert result.complete and result.states > 50_000


# ---- two runs that begin a dataset, or a group, at once


def check_one_dataset(store: MemoryStore, runs: list[Run]) -> None:
    answers = [run.result for run in runs if run.error is None]
    if len({a.fingerprint for a in answers}) > 1:
        raise Violation("two runs work on two datasets in one OUT")
    for run in runs:
        if (
            run.error is not None
            and not isinstance(run.error, Died | FingerprintError)
            and not run.met
        ):
            raise Violation(f"a run failed without a cause: {run.error!r}")


@pytest.mark.parametrize(
    "top_k", [pytest.param(2, marks=pytest.mark.nightly), 3]
)  # the same job, another
def test_one_of_two_first_runs_decides_what_the_dataset_is(top_k: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        _now.store = MemoryStore()
        return _now.store, [lambda: make(OUT, top_k=2), lambda: make(OUT, top_k=top_k)]

    result = explore(
        Scenario(begin, check_one_dataset), Bounds(preemptions=4, faults=2, states=20_000)
    )
    tell("dataset.json", result)
    assert result.complete


def a_grouping(*urls: str) -> Callable[[], list[tuple[int, str]]]:
    """As pipeline.runner settles groups: read the log, append what it lacks, until nothing is
    new.
    """

    def work() -> list[tuple[int, str]]:
        for _ in range(5):
            log = load_group_log(OUT)
            new = sorted(set(urls) - {url for _, url in log})
            if not new:
                return log
            number = 1 + max((group for group, _ in log), default=-1)
            append_group_log(OUT, [(number, url) for url in new])
        raise StorageError("other runs keep appending")

    return work


def check_groups(store: MemoryStore, runs: list[Run]) -> None:
    log = a_grouping("a", "b", "c")()
    urls = [url for _, url in log]
    if sorted(urls) != ["a", "b", "c"]:
        raise Violation(f"a path is in two groups, or in none: {log}")
    for run in runs:
        if run.error is None and not set(run.result) <= set(log):
            raise Violation(f"a run works with {run.result}, the log says {log}")
        if run.error is not None and not run.met:
            raise Violation(f"a run failed without a cause: {run.error!r}")


@pytest.mark.parametrize("faults", [0, 1, 2])
def test_a_path_is_in_one_group_whoever_appends(faults: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        _now.store = MemoryStore()
        return _now.store, [a_grouping("a", "b"), a_grouping("b", "c"), a_grouping("a", "c")]

    result = explore(
        Scenario(begin, check_groups), Bounds(preemptions=2, faults=faults, states=3000)
    )
    tell(f"groups, {faults} faults", result)


def a_pruning(*urls: str) -> Callable[[], list[tuple[int, str]]]:
    """As pipeline.runner takes out what is gone: the files that a group still has, until none is
    left.
    """

    def work() -> list[tuple[int, str]]:
        for _ in range(5):
            log = load_group_log(OUT)
            homes = {url: group for group, url in log}
            if not (gone := [(NO_GROUP, url) for url in urls if homes[url] != NO_GROUP]):
                return log
            append_group_log(OUT, gone)
        raise StorageError("other runs keep appending")

    return work


def check_pruned(store: MemoryStore, runs: list[Run]) -> None:
    log = load_group_log(OUT)
    for url in {url for _, url in log}:
        groups = [group for group, name in log if name == url]
        if NO_GROUP in groups[::2] or set(groups[1::2]) - {NO_GROUP}:
            raise Violation(f"{url} enters where it is, or leaves where it is not: {log}")
    homes = {url: group for group, url in log}
    if all(run.error is None for run in runs) and homes != {"a": NO_GROUP, "b": NO_GROUP, "c": 1}:
        raise Violation(f"in the end: {log}")
    if any(run.error is not None and not run.met for run in runs):
        raise Violation(f"a run failed without a cause: {runs}")


@pytest.mark.parametrize("faults", [0, 1])
def test_two_runs_that_prune_and_one_that_appends_agree(faults: int) -> None:
    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        _now.store = MemoryStore()
        append_group_log(OUT, [(0, "a"), (0, "b")])
        return _now.store, [a_pruning("a"), a_pruning("a", "b"), a_grouping("a", "b", "c")]

    result = explore(
        Scenario(begin, check_pruned), Bounds(preemptions=2, faults=faults, states=3000)
    )
    tell(f"pruned groups, {faults} faults", result)


# ---- mutants


class _Wrapped:
    """A store of which one call is made by other hands."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(_now.store, name)


def put_without_condition(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        _now.store.replace(url, data)
        return True

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def exists_means_mine(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        _now.store.create(*args)
        return True

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def exists_means_error(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        if not _now.store.create(*args):
            raise protocol.CommitError("it exists")
        return True

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def no_answer_means_error(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        try:
            is_created: bool = _now.store.create(*args)
        except StorageError as error:
            raise ValueError("no answer") from error
        return is_created

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def staging_cleaned_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, *rest: Any) -> bool:
        protocol.drop_staging(_now.dataset, url.rsplit("/", 1)[-1].removesuffix(".parquet"))
        is_created: bool = _now.store.create(url, *rest)
        return is_created

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def errors_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        body = protocol.parse_footer(
            {
                k.decode(): v.decode()
                for k, v in pq.read_metadata(pa.BufferReader(data)).metadata.items()
                if k.startswith(b"vitray.")
            }
        )
        protocol.repair_errors(_now.dataset, body)
        is_created: bool = _now.store.create(url, data, metadata)
        return is_created

    patch.setattr(protocol, "store_for", lambda url: _Wrapped(create=create))


def errors_of_the_loser(patch: pytest.MonkeyPatch) -> None:
    """errors/ from what this run saw, not from what was committed."""
    real = protocol.create_data_file

    def create(dataset: Any, data: bytes, metadata: dict[str, str]) -> Any:
        footer, adopted = real(dataset, data, metadata)
        if adopted:
            footer = replace(footer, errors=0, error_rows=footer.error_rows.slice(0, 0))
        return footer, adopted

    patch.setattr(protocol, "create_data_file", create)


def record_before_data(patch: pytest.MonkeyPatch) -> None:
    real = protocol.commit_shard

    def commit_late(dataset: Any, shard: Shard) -> Commit | None:
        finish(dataset, lambda: ([shard.id], []))
        return real(dataset, shard)

    patch.setitem(globals(), "commit_shard", commit_late)


def listed_before_looking(patch: pytest.MonkeyPatch) -> None:
    """What is committed between a run's listing and its manifest step looks superseded."""
    real = finish

    def finish_late(dataset: Any, list_ids: Callable[[], tuple[list[str], list[str]]]) -> Any:
        ids = list_ids()
        return real(dataset, lambda: ids)

    patch.setitem(globals(), "finish", finish_late)


def fragments_written_again(patch: pytest.MonkeyPatch) -> None:
    from vitray.dataset import staging

    def create(url: str, data: bytes) -> bool:
        _now.store.replace(url, data)
        return True

    patch.setattr(staging, "store_for", lambda url: _Wrapped(create=create))


SHORT = Bounds(preemptions=2, faults=1, states=4000)
MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, Bounds]] = {
    put_without_condition: ("two runs that disagree on a bad row", SHORT),
    exists_means_mine: (
        "a commit task left behind",
        Bounds(preemptions=3, faults=0, states=60_000),
    ),
    exists_means_error: ("two runs that disagree on a bad row", SHORT),
    no_answer_means_error: ("two runs that disagree on a bad row", SHORT),
    staging_cleaned_before_the_commit: ("two runs that disagree on a bad row", SHORT),
    errors_before_the_commit: ("two runs that disagree on a bad row", SHORT),
    errors_of_the_loser: ("two runs that disagree on a bad row", SHORT),
    record_before_data: ("two runs that disagree on a bad row", SHORT),
    fragments_written_again: ("two runs that disagree on a bad row", SHORT),
    listed_before_looking: (
        "two runs, and the input changes",
        Bounds(preemptions=2, faults=0, states=60_000),
    ),
}


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.__name__, marks=[] if bounds is SHORT else [NIGHTLY])
        for m, (_, bounds) in MUTANTS.items()
    ],
)
def test_every_mutant_is_caught(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, bounds = MUTANTS[mutant]
    play = scenario(SCENARIOS[name])
    mutant(monkeypatch)
    with pytest.raises(Violation) as caught:
        tell(name, explore(play, bounds))
    print(f"{mutant.__name__}: {str(caught.value).splitlines()[:2]}")
