"""Staged fragments: written once, read as written, and deleted when damaged."""

from __future__ import annotations

from dataclasses import replace

from support.dataset_parts import (
    FACTS,
    copy_file,
    errors_of,
    input_shard,
    make,
    rows_of,
    stage,
    stage_fragments,
    stored,
)
from vitray.dataset import list_staged, read_fragment, repair_staging, write_fragment
from vitray.schema import End
from vitray.storage import join, store_for
from vitray.storage import read as read_object


def test_a_fragment_is_read_as_written_and_written_once(out: str) -> None:
    dataset = make(out)
    rows, bad = rows_of(dataset, "s", [0, 2, 3]), errors_of("s", {1: "empty"})
    assert write_fragment(dataset, "s", (0, 4), rows, bad) is True
    assert (
        write_fragment(
            dataset, "s", (0, 4), rows_of(dataset, "s", [0, 1, 2, 3]), errors_of("s", {})
        )
        is False
    )
    fragment = read_fragment(dataset, "s", 0, 4)
    assert fragment is not None and fragment[0].equals(rows) and fragment[1].equals(bad)
    assert list(stored(out)) == [
        "_vitray/dataset.json",
        "_vitray/staging/s/0000000000-0000000004.arrow",
    ]


def test_every_damaged_fragment_is_deleted(quick_out: str) -> None:
    dataset, shard = make(quick_out), input_shard(quick_out)
    stage(dataset, shard, 20)
    other = replace(dataset, spec=replace(FACTS, precision="bf16"))
    write_fragment(
        other, "other", (4, 8), rows_of(dataset, shard.id, range(4, 8)), errors_of(shard.id, {})
    )
    url = join(dataset.staging_url(shard.id), "{:010d}-{:010d}.arrow").format
    content = read_object(url(0, 4))
    copy_file(dataset, join(dataset.staging_url("other"), "0000000004-0000000008.arrow"), url(4, 8))
    store_for(quick_out).replace(url(8, 12), content)
    store_for(quick_out).replace(url(12, 16), content[: len(content) // 2])
    parts = repair_staging(dataset, shard.id)
    assert (
        list(parts.ranges()) == [(0, 4), (16, 20)]
        and parts.ends == (End(20),)
        and not parts.covers()
    )
    assert list_staged(dataset, shard.id) == parts
    stage_fragments(dataset, shard, 20, {})
    assert repair_staging(dataset, shard.id).covers()
