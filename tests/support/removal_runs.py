"""Removals beside runs of the commit protocol, and what must hold when they end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.dataset_parts import errors_of, rows_of
from support.explorer import Died, MemoryStore, Run, Scenario, Violation
from support.protocol_runs import (
    OUT,
    TOTAL,
    a_run,
    a_run_in_memory,
    broken_by,
    current,
    id_of,
    planned,
    scenario,
    writer,
)
from vitray.dataset import (
    block_keys,
    commit_whole,
    committed_files,
    drop_removed_fragments,
    drop_rows,
    list_staged,
    read_footer,
    read_fragment,
    refresh_manifest,
    removed_keys,
    staged_shards,
)
from vitray.errors import StorageError
from vitray.schema import End
from vitray.storage import join

SHARD = id_of(b"a tar")


def key(index: int) -> str:
    return f"{SHARD}/{index}"


def a_removal(name: str, *indexes: int) -> Callable[[], str]:
    """As operations.removing does it, with one thread."""

    def work() -> str:
        writer.name = name
        blocked = block_keys(OUT, [key(index) for index in indexes], {"by": name})
        for shard in sorted(committed_files(OUT)):
            drop_rows(current.dataset, shard, blocked)
        drop_removed_fragments(current.dataset, blocked)
        refresh_manifest(current.dataset)
        return "removed"

    return work


def broken_by_removal(url: str, old: bytes | None, new: bytes | None) -> str:
    """The promise that a change of one object breaks: rows only ever leave."""
    folder, _, name = url.removeprefix(f"{OUT}/").partition("/")
    if folder == "data" and old is not None and new is not None:
        before, after = _indexes(old), _indexes(new)
        return "" if set(after) <= set(before) else f"{url} went from {before} to {after}"
    has_lists = any("/removed/" in other for other in current.store.objects)
    if folder == "_vitray" and name.startswith("staging/") and new is None and has_lists:
        return ""  # a fragment with a removed key is made again
    return broken_by(url, old, new)


def _indexes(data: bytes) -> list[int]:
    return list(pq.read_table(pa.BufferReader(data), columns=["index"])["index"].to_pylist())


def held_keys() -> list[str]:
    """Removed keys that some object still holds."""
    removed = removed_keys(OUT)
    held = list[str]()
    for shard, info in committed_files(OUT).items():
        table = pq.read_table(pa.BufferReader(current.store.objects[info.url]))
        keys = table["key"].to_pylist() + read_footer(info.url).error_rows["key"].to_pylist()
        held += [f"{shard}: {one}" for one in keys if removed.blocked(pa.array([one]))]
    for url, data in current.store.objects.items():
        if url.startswith(join(OUT, "_errors", "")):
            keys = pq.read_table(pa.BufferReader(data))["key"].to_pylist()
            held += [f"{url}: {one}" for one in keys if removed.blocked(pa.array([one]))]
    return held


def staged_keys() -> list[str]:
    removed = removed_keys(OUT)
    held = list[str]()
    for shard in staged_shards(current.dataset):
        for start, stop in list_staged(current.dataset, shard).ranges():
            fragment = read_fragment(current.dataset, shard, start, stop)
            if fragment is not None and removed.filter(fragment) is not fragment:
                held.append(f"{shard}: {start}-{stop}")
    return held


def in_new_thread(work: Callable[[], Any]) -> None:
    """Like a process that begins: a thread remembers removed keys for some seconds."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def check_removed(*indexes: int) -> Callable[[MemoryStore, list[Run]], None]:
    """No false failure; after all ended well no key is left, and after one more removal anyway."""

    def check(store: MemoryStore, runs: list[Run]) -> None:
        in_new_thread(lambda: check_here(store, runs))

    def check_here(store: MemoryStore, runs: list[Run]) -> None:
        for run in runs:
            is_cause = isinstance(run.error, StorageError) and run.met
            if run.error is not None and not isinstance(run.error, Died) and not is_cause:
                raise Violation(f"a run failed without a cause: {run.error!r}, {run.met}")
        is_removed = any(run.result == "removed" for run in runs)
        if is_removed and all(run.error is None for run in runs) and (held := held_keys()):
            raise Violation(f"all ended well, and these are left: {held}")
        a_run("last")()
        a_removal("last", *indexes)()
        if held := held_keys() + staged_keys():
            raise Violation(f"after another removal these are left: {held}")
        (info,) = committed_files(OUT).values()
        footer = read_footer(info.url)
        table = pq.read_table(pa.BufferReader(store.objects[info.url]))
        seen = sorted(table["index"].to_pylist() + footer.error_rows["index"].to_pylist())
        if seen != [index for index in range(TOTAL) if index not in indexes]:
            raise Violation(f"the rows are {seen}, without {indexes}")
        if (footer.total, footer.removed) != (TOTAL, len(indexes)):
            raise Violation(f"the footer says {footer.total} images, {footer.removed} removed")

    return check


def removal_scenario(
    runs: Callable[[], list[Callable[[], Any]]], *indexes: int, committed: bool = False
) -> Scenario:
    """committed: the shard is committed before the runs begin."""
    base = scenario(list)
    if committed:
        in_new_thread(a_run("first", {1: "empty"}))
    at_first = dict(current.store.objects)

    def begin() -> tuple[MemoryStore, list[Callable[[], Any]]]:
        base.begin()
        current.store.objects = dict(at_first)
        current.store.watch = broken_by_removal
        return current.store, runs()

    return Scenario(begin, check_removed(*indexes))


def a_commit(name: str, bad: dict[int, str] | None = None) -> Callable[[], Any]:
    """A worker that commits the shard, and no manifest step after it. bad: as of `a_run`."""

    def work() -> Any:
        writer.name = name
        shard, errors = planned(), bad or {}
        good = [index for index in range(TOTAL) if index not in errors]
        rows = rows_of(current.dataset, shard.id, good)
        return commit_whole(current.dataset, shard, rows, errors_of(shard.id, errors), End(TOTAL))

    return work


REMOVALS: dict[str, Callable[[], Scenario]] = {
    "a removal beside a run": lambda: removal_scenario(lambda: [a_run("a"), a_removal("r", 1)], 1),
    "a removal beside a run in memory": lambda: removal_scenario(
        lambda: [a_run_in_memory("a", {2: "empty"}), a_removal("r", 0, 2)], 0, 2
    ),
    "a removal beside a worker": lambda: removal_scenario(
        lambda: [a_commit("a"), a_removal("r", 1)], 1
    ),
    "a removal beside a worker with bad images": lambda: removal_scenario(
        lambda: [a_commit("a", {1: "empty", 2: "empty"}), a_removal("r", 1)], 1
    ),
    "two removals of a committed shard": lambda: removal_scenario(
        lambda: [a_removal("r", 0), a_removal("s", 1)], 0, 1, committed=True
    ),
    "a removal beside a run that has nothing to do": lambda: removal_scenario(
        lambda: [a_run("a"), a_removal("r", 1, 2)], 1, 2, committed=True
    ),
}
