"""When a worker commits a shard: once all its fragments and its end are written."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from vitray.pipeline.events import (
    FragmentSkipped,
    FragmentWritten,
    ShardChanged,
    ShardEnded,
    ShardEvent,
)
from vitray.pipeline.worker import Coverage
from vitray.schema import End, Shard, ShardKind

SHARD = Shard("a", ShardKind.TAR, "a.tar", 1, "v")
OTHER = Shard("b", ShardKind.TAR, "b.tar", 1, "v")
FIRST = FragmentWritten("a", 0, 4)
SECOND = FragmentSkipped("a", 4, 8)
LAST = FragmentWritten("a", 8, 10)
END = ShardEnded("a", End(10))


def completions(coverage: Coverage, events: list[list[ShardEvent]]) -> list[Shard | None]:
    return [coverage.completed_by(group) for group in events]


@pytest.mark.parametrize("order", [*itertools.permutations((FIRST, SECOND, LAST, END))])
def test_a_shard_is_complete_once_whatever_the_order(order: tuple[ShardEvent, ...]) -> None:
    coverage = Coverage()
    coverage.begin(SHARD)
    found = completions(coverage, [[event] for event in order])
    assert found == [None, None, None, SHARD]


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param([[FIRST], [SECOND], [LAST, END]], [None, None, SHARD], id="end with the last"),
        pytest.param(
            [[LAST, END], [FIRST], [SECOND]], [None, None, SHARD], id="the last one first"
        ),
        pytest.param([[FIRST], [LAST, END]], [None, None], id="a gap"),
        pytest.param([[FIRST], [SECOND], [LAST]], [None, None, None], id="no end"),
        pytest.param([[FIRST], [SECOND], [END]], [None, None, None], id="less than the end says"),
        pytest.param([[FIRST], [FIRST], [SECOND], [LAST, END]], [None] * 3 + [SHARD], id="twice"),
        pytest.param([[ShardEnded("a", End(0))]], [SHARD], id="an empty shard"),
        pytest.param([[ShardChanged("a")]], [None], id="no fragment at all"),
    ],
)
def test_completeness(events: list[list[ShardEvent]], expected: list[Shard | None]) -> None:
    coverage = Coverage()
    coverage.begin(SHARD)
    assert completions(coverage, events) == expected


def test_shards_are_told_apart() -> None:
    coverage = Coverage()
    coverage.begin(SHARD)
    coverage.begin(OTHER)
    found = completions(
        coverage,
        [[FIRST], [FragmentWritten("b", 0, 4), ShardEnded("b", End(4))], [SECOND], [LAST, END]],
    )
    assert found == [None, OTHER, None, SHARD]


def test_another_attempt_begins_anew() -> None:
    """Its fragments are checked again: what the first attempt reported does not count."""
    coverage = Coverage()
    coverage.begin(SHARD)
    assert completions(coverage, [[FIRST], [SECOND]]) == [None, None]
    coverage.begin(SHARD)
    assert completions(coverage, [[LAST, END], [FIRST], [SECOND]]) == [None, None, SHARD]
    coverage.begin(SHARD)
    assert completions(coverage, [[FIRST], [SECOND], [LAST, END]]) == [None, None, SHARD]


def test_late_events_of_an_earlier_attempt_complete_nothing() -> None:
    """A fragment that was in flight when its shard failed arrives after the second attempt."""
    coverage = Coverage()
    coverage.begin(SHARD)
    assert completions(coverage, [[FIRST], [SECOND], [LAST, END]]) == [None, None, SHARD]
    assert completions(coverage, [[FIRST], [END], [SECOND], [LAST]]) == [None] * 4


def test_of_many_threads_one_completes_the_shard() -> None:
    events = [FragmentWritten("a", n, n + 1) for n in range(400)]
    coverage = Coverage()
    coverage.begin(SHARD)
    coverage.completed_by([ShardEnded("a", End(400))])
    random.Random(3).shuffle(events)
    found = list[Shard | None]()

    def add(first: int) -> None:
        found.extend(coverage.completed_by([event]) for event in events[first::4])

    threads = [threading.Thread(target=add, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and found.count(SHARD) == 1
