"""`--partition 3/16`: the shares of independent processes, and who helps whom."""

from __future__ import annotations

import random

import pytest

from vitray.errors import JobError
from vitray.pipeline.partition import Partition, parse_partition, part_of, partition_first

SHARDS = [f"photos-{number:05d}-0123456789-aaaaaaaa" for number in range(2000)]


@pytest.mark.parametrize(
    ("text", "partition"),
    [("0/1", Partition(0, 1)), ("3/16", Partition(3, 16)), (" 15/16 ", Partition(15, 16))],
)
def test_a_partition_is_an_index_from_0_and_a_count(text: str, partition: Partition) -> None:
    assert parse_partition(text) == partition


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("16/16", "of 16 parts, the indexes are 0 to 15"),
        ("0/0", "of 0 parts, the indexes are none"),
        ("a/b", "The index starts at 0"),
        ("-1/4", "The index starts at 0"),
        ("1/-4", "The index starts at 0"),
        ("3", "The index starts at 0"),
        ("1/2/3", "The index starts at 0"),
        ("1.0/4", "The index starts at 0"),
        ("", "The index starts at 0"),
        ("٣/٤", "The index starts at 0"),
        ("1/" + "9" * 5000, "The index starts at 0"),
    ],
)
def test_anything_else_is_refused_with_an_example(text: str, words: str) -> None:
    with pytest.raises(JobError, match=words) as refused:
        parse_partition(text)
    assert "3/16" in str(refused.value)


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_every_process_has_all_shards_and_begins_with_its_own(count: int) -> None:
    orders = [partition_first(SHARDS, Partition(index, count)) for index in range(count)]
    for index, order in enumerate(orders):
        assert sorted(order) == SHARDS
        own = [shard for shard in SHARDS if part_of(shard, count) == index]
        assert order[: len(own)] == own


def test_parts_are_of_similar_size() -> None:
    sizes = [sum(part_of(shard, 16) == index for shard in SHARDS) for index in range(16)]
    assert sum(sizes) == 2000
    assert min(sizes) > 90 and max(sizes) < 165  # 125 on average


def test_a_helper_begins_with_the_last_shards_of_the_next_part() -> None:
    for index in range(16):
        order = partition_first(SHARDS, Partition(index, 16))
        following = [shard for shard in SHARDS if part_of(shard, 16) == (index + 1) % 16]
        own = sum(part_of(shard, 16) == index for shard in SHARDS)
        assert order[own : own + len(following)] == following[::-1]


def test_processes_agree_where_their_listings_differ() -> None:
    rng = random.Random(0)
    listings = [[shard for shard in SHARDS if rng.random() < 0.99] for _ in range(4)]
    first = [
        set(partition_first(listing, Partition(index, 4))[:400])
        for index, listing in enumerate(listings)
    ]
    assert [len(a & b) for i, a in enumerate(first) for b in first[:i]] == [0] * 6


def test_a_partition_of_nothing_is_empty() -> None:
    assert partition_first([], Partition(2, 3)) == []
