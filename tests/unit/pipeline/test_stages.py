"""The read stage without Ray: the fragments of a shard, also of one that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import hand_made
from vitray.dataset import write_end, write_fragment
from vitray.pipeline.stages import read_stage
from vitray.schema import ERROR_SCHEMA, Encoded, End, EventKind
from vitray.sources import list_shards, read_shard


def test_a_broken_shard_is_read_again_at_once_and_yields_each_fragment_once(tmp_path: Path) -> None:
    """Of two row groups the second one is damaged: the images of the first one are used."""
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
    events = [batch.event for batch in read_stage(dataset, shard)]
    assert [(event.kind, event.start, event.stop) for event in events[:-1]] == [
        (EventKind.FRAGMENT_WRITTEN, 0, 4),
        (EventKind.FRAGMENT_WRITTEN, 4, 8),
    ]
    assert events[-1].kind == EventKind.SHARD_BROKEN and "one.parquet" in events[-1].message


def test_what_is_no_tar_is_broken_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    (tmp_path / "in" / "zz.tar").write_bytes(b"no tar" * 500)
    shard = list_shards(dataset.job, []).shards[-1]
    (event,) = [batch.event for batch in read_stage(dataset, shard)]
    assert event.kind == EventKind.SHARD_BROKEN and "is not a tar" in event.message


def test_a_short_fragment_of_an_earlier_read_shifts_no_fragment(tmp_path: Path) -> None:
    """A read of the tar cut after 6 images left fragment 4-6 and an end; now it has 10 images."""
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
    batches = list(read_stage(dataset, shard))
    assert [(batch.event.kind, batch.event.start, batch.event.stop) for batch in batches[:-1]] == [
        (EventKind.FRAGMENT_WRITTEN, 0, 4),
        (EventKind.FRAGMENT_WRITTEN, 4, 8),
        (EventKind.FRAGMENT_WRITTEN, 8, 10),
    ]
    assert [batch.rows["index"].to_pylist() for batch in batches if batch.rows is not None] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert batches[-1].event.total == 10
