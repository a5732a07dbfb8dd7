"""Blocks: fragments that are decoded and predicted together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factories import hand_made
from vitray.dataset import Dataset, resolve_dataset
from vitray.pipeline import decoders
from vitray.pipeline.bounded_queue import BoundedQueue
from vitray.pipeline.decoders import read_blocks
from vitray.pipeline.events import FragmentSkipped, ShardBroken, ShardEnded
from vitray.pipeline.stages import EncodedFragment, FragmentInfo, ReadItem, ShardEnd
from vitray.schema import End, Shard, ShardKind, VectorColumn

ROWS = 8


def shard_of(number: int, images: int) -> Shard:
    return Shard(f"s{number}", ShardKind.TAR, f"s{number}.tar", images, "v", rows=images)


def fragments_of(dataset: Dataset, shard: Shard) -> Iterator[ReadItem]:
    """As read_stage, of shards that know their number of images."""
    assert shard.rows is not None
    for start in range(0, shard.rows, dataset.fragment_rows):
        stop = min(start + dataset.fragment_rows, shard.rows)
        end = End(shard.rows) if stop == shard.rows else None
        yield EncodedFragment(FragmentInfo(shard, start, stop, end), [], [], pa.table({}))
    if shard.rows == 0:
        yield ShardEnd(shard, End(0))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("blocks")
    vector = VectorColumn("embedding", hand_made.DIMENSION, None, "cls", True, "float32")
    return resolve_dataset(
        hand_made.job_of(folder, fragment_rows=ROWS),
        hand_made.spec_of("m"),
        [vector],
        pa.schema([]),
        "2026-01-01T00:00:00+00:00",
    )


@pytest.fixture(autouse=True)
def counted_fragments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "read_stage", fragments_of)


def queue_of(sizes: Sequence[int], is_finished: bool = True) -> BoundedQueue[Shard]:
    queue = BoundedQueue[Shard](most_items=1000)
    for number, images in enumerate(sizes):
        queue.put(shard_of(number, images))
    if is_finished:
        queue.finish()
    return queue


Span = tuple[str, int, int]


def spans(block: object) -> list[Span]:
    assert isinstance(block, list)
    infos = [fragment.info for fragment in block]
    return [(info.shard.id, info.start, info.stop) for info in infos]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        pytest.param([3, 3, 3, 3], [[3, 3], [3, 3]], id="small shards share a block"),
        pytest.param([1, 7, 8, 3], [[1, 7], [8], [3]], id="a full block goes on"),
        pytest.param([3, 20], [[3], [8], [8], [4]], id="large shards are divided"),
        pytest.param([20, 3], [[8], [8], [4, 3]], id="a rest shares a block with the next shard"),
        pytest.param([8, 8], [[8], [8]], id="shards of one fragment"),
        pytest.param([1] * 9, [[1] * 8, [1]], id="tiny shards"),
        pytest.param([5], [[5]], id="one shard"),
        pytest.param([], [], id="no shard"),
    ],
)
def test_blocks(dataset: Dataset, sizes: list[int], expected: list[list[int]]) -> None:
    found = [spans(b) for b in read_blocks(dataset, queue_of(sizes), threading.Event())]
    assert [[stop - start for _, start, stop in block] for block in found] == expected


@settings(suppress_health_check=list(HealthCheck), deadline=None)
@given(st.lists(st.integers(0, 30), max_size=40))
def test_blocks_have_every_image_once_and_never_more_than_a_fragment(
    dataset: Dataset, sizes: list[int]
) -> None:
    items = list(read_blocks(dataset, queue_of(sizes), threading.Event()))
    blocks = [spans(item) for item in items if isinstance(item, list)]
    found = [span for block in blocks for span in block]
    expected = [
        (f"s{number}", start, min(start + ROWS, images))
        for number, images in enumerate(sizes)
        for start in range(0, images, ROWS)
    ]
    assert found == expected
    assert all(0 < sum(stop - start for _, start, stop in block) <= ROWS for block in blocks)
    ends = [item.shard.id for item in items if isinstance(item, ShardEnd)]
    assert ends == [f"s{number}" for number, images in enumerate(sizes) if images == 0]
    # Neighbours that fit into one block are in one.
    lengths = [sum(stop - start for _, start, stop in block) for block in blocks]
    firsts = [block[0][2] - block[0][1] for block in blocks]
    assert all(length + first > ROWS for length, first in zip(lengths, firsts[1:]))


def test_what_was_read_does_not_wait_for_a_shard_that_is_long_in_coming(dataset: Dataset) -> None:
    queue = queue_of([3], is_finished=False)
    blocks = read_blocks(dataset, queue, threading.Event())
    assert spans(next(blocks)) == [("s0", 0, 3)]
    queue.put(shard_of(1, 2))
    assert spans(next(blocks)) == [("s1", 0, 2)]
    queue.finish()
    assert list(blocks) == []


def test_nothing_more_is_read_once_it_stops_and_what_was_read_goes_on(dataset: Dataset) -> None:
    stopping = threading.Event()
    queue = queue_of([20, 3, 3])
    blocks = read_blocks(dataset, queue, stopping)
    assert spans(next(blocks)) == [("s0", 0, 8)]
    assert spans(next(blocks)) == [("s0", 8, 16)]
    stopping.set()
    rest = [span for block in blocks for span in spans(block)]
    assert rest in ([], [("s0", 16, 20)]) and len(queue) >= 1


def test_other_items_are_handed_on_as_they_come(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    items: dict[str, list[ReadItem]] = {
        "s0": [FragmentSkipped("s0", 0, 8), ShardEnded("s0", End(8))],
        "s1": [*fragments_of(dataset, shard_of(1, 3))],
        "s2": [ShardBroken("s2", "it is not a tar")],
    }
    monkeypatch.setattr(decoders, "read_stage", lambda dataset, shard: iter(items[shard.id]))
    found = list(read_blocks(dataset, queue_of([8, 3, 1]), threading.Event()))
    assert found == [*items["s0"], *items["s2"], items["s1"]]


def test_a_shard_that_fails_in_the_middle_loses_no_fragment_of_others(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(dataset: Dataset, shard: Shard) -> Iterator[ReadItem]:
        yield from fragments_of(dataset, shard)
        if shard.id == "s1":
            yield ShardBroken("s1", "cut")

    monkeypatch.setattr(decoders, "read_stage", read)
    found = list(read_blocks(dataset, queue_of([3, 3, 3]), threading.Event()))
    blocks = [spans(item) for item in found if isinstance(item, list)]
    assert [span for block in blocks for span in block] == [
        ("s0", 0, 3),
        ("s1", 0, 3),
        ("s2", 0, 3),
    ]
    assert ShardBroken("s1", "cut") in found


def test_fragments_that_are_not_joined_are_blocks_of_their_own(dataset: Dataset) -> None:
    blocks = read_blocks(dataset, queue_of([20, 3, 3]), threading.Event(), joined=False)
    assert [spans(block) for block in blocks] == [
        [("s0", 0, 8)],
        [("s0", 8, 16)],
        [("s0", 16, 20)],
        [("s1", 0, 3)],
        [("s2", 0, 3)],
    ]
