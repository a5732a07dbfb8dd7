"""Staged fragments: written once, read as written, and deleted when damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.dataset_parts import (
    data_table,
    errors_of,
    input_shard,
    make,
    rows_of,
    stage,
    stage_fragments,
)
from vitray.dataset import (
    commit_shard,
    list_staged,
    read_fragment,
    repair_staging,
    staged_shards,
    write_end,
    write_fragment,
)
from vitray.schema import End
from vitray.storage import exists, join, store_for


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ([0, 1, 2], []),
        ([0, 1, 2, 4], []),
        ([0, 1, 2, 3], [3]),
        ([1, 0, 2, 3], []),
        ([0, 1, 2, 2], []),
        ([], []),
    ],
)
def test_a_fragment_with_other_indexes_is_refused(
    local_out: str, good: list[int], bad: list[int]
) -> None:
    dataset = make(local_out)
    with pytest.raises(ValueError, match=r"do not make up \(0, 4\)"):
        write_fragment(
            dataset,
            "s",
            (0, 4),
            rows_of(dataset, "s", good),
            errors_of("s", dict.fromkeys(bad, "empty")),
        )
    assert list_staged(dataset, "s").fragments == {}


def test_staged_tells_ranges_ends_and_whether_they_tile(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    assert not list_staged(dataset, shard.id).covers() and staged_shards(dataset) == []
    stage_fragments(dataset, shard, 10, {})
    assert not list_staged(dataset, shard.id).covers(), "no end yet"
    write_end(dataset, shard.id, End(10, 512, "cut"))
    parts = list_staged(dataset, shard.id)
    assert (
        list(parts.ranges()) == [(0, 4), (4, 8), (8, 10)]
        and parts.ends == (End(10, 512, "cut"),)
        and parts.covers()
    )
    store_for(local_out).delete(
        [join(dataset.staging_url(shard.id), "0000000004-0000000008.arrow")]
    )
    assert not list_staged(dataset, shard.id).covers()
    assert staged_shards(dataset) == [shard.id]


def test_an_end_is_written_once(local_out: str) -> None:
    dataset = make(local_out)
    write_end(dataset, "s", End(4, None, "first"))
    write_end(dataset, "s", End(4, 9, "second"))
    assert list_staged(dataset, "s").ends == (End(4, None, "first"),)


def test_a_fragment_with_any_bit_flipped_is_no_fragment(local_out: str) -> None:
    dataset = make(local_out)
    write_fragment(
        dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 3]), errors_of("s", {2: "empty"})
    )
    url = Path(join(dataset.staging_url("s"), "0000000000-0000000004.arrow"))
    content = url.read_bytes()
    for at in range(0, len(content), 53):
        spoilt = bytearray(content)
        spoilt[at] ^= 1 << at % 8
        url.write_bytes(spoilt)
        assert read_fragment(dataset, "s", 0, 4) is None


def test_a_fragment_cut_at_any_byte_is_no_fragment(local_out: str) -> None:
    dataset = make(local_out)
    write_fragment(
        dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 3]), errors_of("s", {2: "empty"})
    )
    url = join(dataset.staging_url("s"), "0000000000-0000000004.arrow")
    content = Path(url).read_bytes()
    for cut in {*range(0, len(content), 97), 1, 7, 8, 9, len(content) - 1}:
        Path(url).write_bytes(content[:cut])
        assert read_fragment(dataset, "s", 0, 4) is None
    Path(url).write_bytes(content)
    assert read_fragment(dataset, "s", 0, 4) is not None


def test_a_damaged_end_is_deleted_and_written_again(local_out: str) -> None:
    dataset = make(local_out)
    write_end(dataset, "s", End(4, 77))
    url = join(dataset.staging_url("s"), "end-4.arrow")
    content = Path(url).read_bytes()
    for damaged in (b"", content[:9], content[: len(content) // 2]):
        Path(url).write_bytes(damaged)
        assert list_staged(dataset, "s").ends == ()
        assert repair_staging(dataset, "s").ends == () and not exists(url)
        write_end(dataset, "s", End(4, 77))
        assert list_staged(dataset, "s").ends == (End(4, 77),)


def test_a_fragment_beyond_the_end_does_not_block_the_shard(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    stage_fragments(
        dataset, shard, 8, {}
    )  # a reader that died, and had seen more rows than the one that came after
    write_end(dataset, shard.id, End(6))
    assert list(repair_staging(dataset, shard.id).ranges()) == [(0, 4)]
    stage_fragments(dataset, shard, 6, {})
    done = commit_shard(dataset, shard)
    assert done is not None and done.rows == 6


def test_a_fragment_apart_behind_the_end_is_not_committed(local_out: str) -> None:
    dataset, shard = make(local_out), input_shard(local_out)
    write_fragment(
        dataset,
        shard.id,
        (12, 16),
        rows_of(dataset, shard.id, range(12, 16)),
        errors_of(shard.id, {}),
    )
    stage(dataset, shard, 8)  # the reader that died had decoded 12-16 before 8-12
    assert not list_staged(dataset, shard.id).covers() and commit_shard(dataset, shard) is None
    assert repair_staging(dataset, shard.id).covers()
    done = commit_shard(dataset, shard)
    assert (
        done is not None
        and done.rows == 8
        and data_table(dataset, shard)["index"].to_pylist() == list(range(8))
    )
