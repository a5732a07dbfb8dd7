"""Runs of the commit protocol on a store in memory, and what must hold when they end."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.dataset_parts import errors_of, make, rows_of, vector
from support.explorer import (
    ANSWER_LOST,
    ANSWER_LOST_THEN_REFUSED,
    Died,
    Found,
    MemoryStore,
    Run,
    Scenario,
    Violation,
)
from vitray.dataset import (
    Commit,
    append_group_log,
    commit_shard,
    commit_whole,
    committed_files,
    load_group_log,
    read_footer,
    read_manifest,
    repair_staging,
    staged_shards,
    write_end,
    write_fragment,
    write_manifest,
)
from vitray.errors import ObjectChanged, StorageError
from vitray.schema import End, Shard, short_hash
from vitray.storage import exists, join, store_for

OUT, SOURCE = "s3://b/out", "s3://b/in/cats.tar"
SPANS, TOTAL = ((0, 2), (2, 3)), 3
NIGHTLY = pytest.mark.nightly
current = SimpleNamespace(store=MemoryStore())
writer = threading.local()


def next_write_id() -> str:
    writer.writes = getattr(writer, "writes", 0) + 1
    return f"{getattr(writer, 'name', 'last')}-{writer.writes}"


def planned() -> Shard:
    info = store_for(SOURCE).stat(SOURCE)
    return Shard(
        f"cats-{short_hash(SOURCE)}-{short_hash(info.version, 8)}",
        "tar",
        SOURCE,
        info.size,
        info.version,
    )


def id_of(source: bytes) -> str:
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
        writer.name, done = name, None
        for _ in range(3):
            shard = planned()
            if shard.id not in committed_files(OUT):
                done = make_dataset_of(shard, bad or {}, drift)
            if shard.id in committed_files(OUT):
                write_manifest(current.dataset, listed)
                return done
        raise StorageError("set aside after 3 attempts")

    return work


def make_dataset_of(shard: Shard, bad: dict[int, str], drift: float) -> Commit | None:
    dataset, parts = current.dataset, repair_staging(current.dataset, shard.id)
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


def a_run_in_memory(name: str, bad: dict[int, str] | None = None) -> Callable[[], Commit | None]:
    """A run that has all rows of the shard in memory and stages nothing."""

    def work() -> Commit | None:
        writer.name, wrong, shard = name, bad or {}, planned()
        rows = rows_of(current.dataset, shard.id, [i for i in range(TOTAL) if i not in wrong])
        errors = errors_of(shard.id, wrong)
        try:
            done = commit_whole(current.dataset, shard, rows, errors, End(TOTAL))
        except ObjectChanged:
            return None
        write_manifest(current.dataset, listed)
        return done

    return work


def a_commit_task(name: str) -> Callable[[], Commit | None]:
    """A task on a machine that has lost its driver: it works on whatever is staged."""

    def work() -> Commit | None:
        writer.name = name
        return commit_shard(current.dataset, planned())

    return work


def the_input_changes() -> None:
    store_for(SOURCE).replace(SOURCE, b"another tar")


def broken_by(url: str, old: bytes | None, new: bytes | None) -> str:
    """The promise that a change of one object breaks, at that instant."""
    objects = current.store.objects
    folder, _, name = url.removeprefix(f"{OUT}/").partition("/")
    data = join(OUT, "data", name)
    if folder == "data" and old is not None and new is not None:
        return f"{url} was written a second time"
    if (
        folder == "data"
        and new is None
        and name == f"{id_of(current.store.objects[SOURCE])}.parquet"
    ):
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
        and name == f"{id_of(objects[SOURCE])}.parquet"
    ):
        return f"{url} was written before its data file"
    if name.startswith("staging/") and old is not None:
        if new is not None:
            return f"{url} was written a second time"
        shard = name.split("/")[1]
        if join(OUT, "data", f"{shard}.parquet") not in objects and shard == id_of(objects[SOURCE]):
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
    shard, data = planned(), committed_files(OUT)
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
        current.dataset
    ):  # of an older version, a run that was left behind may write some at any time
        raise Violation(f"staging is left: {staged_shards(current.dataset)}")


def scenario(runs: Callable[[], list[Callable[[], Any]]]) -> Scenario:
    current.store = MemoryStore()
    current.dataset = make(OUT, fragment_rows=SPANS[0][1])
    store_for(SOURCE).replace(SOURCE, b"a tar")
    at_first = dict(current.store.objects)

    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        current.store = MemoryStore()
        current.store.objects, current.store.watch = dict(at_first), broken_by
        return current.store, runs()

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
    "a run in memory beside one that stages": lambda: [
        a_run("a"),
        a_run_in_memory("b", {1: "time_limit"}),
    ],
    "two runs in memory, and the input changes": lambda: [
        a_run_in_memory("a"),
        a_run_in_memory("b", {2: "truncated"}),
        the_input_changes,
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
