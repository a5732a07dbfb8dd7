"""The steps of the line without Ray: what a shard becomes, also one that cannot be read."""

from __future__ import annotations

from pathlib import Path

import hand_made
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitray.dataset import write_end, write_fragment
from vitray.pipeline.stages import read_step
from vitray.schema import ERROR_SCHEMA, Encoded, End
from vitray.sources import list_shards, read_shard


def test_a_broken_shard_is_read_again_at_once_and_yields_each_fragment_once(tmp_path: Path) -> None:
    """Two row groups, the second one damaged: what was read before stays, and the event says what
    is wrong.
    """
    path = tmp_path / "in" / "one.parquet"
    path.parent.mkdir()
    images = [bytes([n]) * 2000 for n in range(20)]
    pq.write_table(
        pa.table({"image": images}),
        path,
        row_group_size=10,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(path.read_bytes())
    at = data.index(images[15])
    data[at : at + 8] = b"\xff" * 8
    second = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data[second.data_page_offset : second.data_page_offset + 30] = b"\xff" * 30
    path.write_bytes(bytes(data))
    dataset = hand_made.make_dataset(tmp_path / "other", commit=0)
    job = hand_made.job_of(tmp_path, source=str(path))
    (shard,) = list_shards(job, []).shards
    received = [batch.event for batch in read_step(dataset, shard)]
    assert [(r.kind, r.start, r.stop) for r in received[:-1]] == [
        ("fragment", 0, 4),
        ("fragment", 4, 8),
    ]
    assert received[-1].kind == "broken" and "one.parquet" in received[-1].message


def test_what_is_no_tar_is_broken_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    (tmp_path / "in" / "zz.tar").write_bytes(b"no tar" * 500)
    shard = list_shards(dataset.job, []).shards[-1]
    (event,) = [batch.event for batch in read_step(dataset, shard)]
    assert event.kind == "broken" and "is not a tar" in event.message


def test_the_tail_of_a_reading_that_ended_elsewhere_cuts_no_fragment(tmp_path: Path) -> None:
    """A reader that saw the tar cut after 6 images left 4-6 and its end; now there are 10."""
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    shard = list_shards(dataset.job, []).shards[0]
    hand_made.stage(dataset, shard)
    staging = tmp_path / "out" / "_vitray" / "staging" / shard.id
    for path in staging.iterdir():
        path.unlink()
    images = [
        item for item in read_shard(shard, dataset.job, lambda _: True) if isinstance(item, Encoded)
    ]
    rows = pa.Table.from_pylist(
        [hand_made.row(dataset, shard, image) for image in images[4:6]], schema=dataset.schema
    )
    write_fragment(dataset, shard.id, (4, 6), rows, ERROR_SCHEMA.empty_table())
    write_end(dataset, shard.id, End(6, 5000))
    batches = list(read_step(dataset, shard))
    assert [(p.event.kind, p.event.start, p.event.stop) for p in batches[:-1]] == [
        ("fragment", 0, 4),
        ("fragment", 4, 8),
        ("fragment", 8, 10),
    ]
    assert [p.rows["index"].to_pylist() for p in batches if p.rows is not None] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert batches[-1].event.total == 10
