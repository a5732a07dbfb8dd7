"""Mistakes that one could make in the commit protocol are all caught."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support import protocol_runs
from support.explorer import Bounds, Violation, explore
from support.protocol_runs import NIGHTLY, SCENARIOS, current, next_write_id, scenario, tell
from vitray.dataset import Commit, identity, write_manifest
from vitray.dataset import commit as protocol
from vitray.dataset.footer import parse_footer
from vitray.errors import CommitError, StorageError
from vitray.schema import Shard
from vitray.storage import stores


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// is the store of the execution at hand, and write-ids follow from who writes: a repeated
    execution is the same.
    """
    monkeypatch.setattr(stores, "s3_store", lambda *_: current.store)
    monkeypatch.setattr(uuid, "uuid4", lambda: SimpleNamespace(hex=next_write_id()))
    monkeypatch.setattr(
        identity, "version", cache(identity.version)
    )  # read thousands of times, most of the time that this took


class WrappedStore:
    """A store of which one call is made by other hands."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(current.store, name)


def put_without_condition(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        current.store.replace(url, data)
        return True

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


def exists_means_mine(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        current.store.create(*args)
        return True

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


def exists_means_error(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        if not current.store.create(*args):
            raise CommitError("it exists")
        return True

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


def no_answer_means_error(patch: pytest.MonkeyPatch) -> None:
    def create(*args: Any) -> bool:
        try:
            is_created: bool = current.store.create(*args)
        except StorageError as error:
            raise ValueError("no answer") from error
        return is_created

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


def staging_cleaned_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, *rest: Any) -> bool:
        protocol.drop_staging(current.dataset, url.rsplit("/", 1)[-1].removesuffix(".parquet"))
        is_created: bool = current.store.create(url, *rest)
        return is_created

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


def errors_before_the_commit(patch: pytest.MonkeyPatch) -> None:
    def create(url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        body = parse_footer(
            {
                k.decode(): v.decode()
                for k, v in pq.read_metadata(pa.BufferReader(data)).metadata.items()
                if k.startswith(b"vitray.")
            }
        )
        protocol.write_errors(current.dataset, body)
        is_created: bool = current.store.create(url, data, metadata)
        return is_created

    patch.setattr(protocol, "store_for", lambda url: WrappedStore(create=create))


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
        write_manifest(dataset, lambda: ([shard.id], []))
        return real(dataset, shard)

    patch.setattr(protocol_runs, "commit_shard", commit_late)


def listed_before_looking(patch: pytest.MonkeyPatch) -> None:
    """What is committed between a run's listing and its manifest step looks superseded."""
    real = write_manifest

    def finish_late(dataset: Any, list_ids: Callable[[], tuple[list[str], list[str]]]) -> Any:
        ids = list_ids()
        return real(dataset, lambda: ids)

    patch.setattr(protocol_runs, "write_manifest", finish_late)


def fragments_written_again(patch: pytest.MonkeyPatch) -> None:
    from vitray.dataset import staging

    def create(url: str, data: bytes) -> bool:
        current.store.replace(url, data)
        return True

    patch.setattr(staging, "store_for", lambda url: WrappedStore(create=create))


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
    fragments_written_again: (
        "two runs that disagree on a bad row",
        Bounds(preemptions=2, faults=1, states=8000),
    ),
    listed_before_looking: (
        "two runs, and the input changes",
        Bounds(preemptions=2, faults=0, states=60_000),
    ),
}


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.__name__, marks=[] if bounds.states <= 8000 else [NIGHTLY])
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
