"""The read stage without Ray: the fragments of a shard, also of one that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import hand_made
from vitray.dataset import write_end, write_fragment
from vitray.errors import ObjectChanged, StorageError
from vitray.pipeline.events import (
    FragmentSkipped,
    ShardBroken,
    ShardChanged,
    ShardEnded,
    ShardFailed,
)
from vitray.pipeline.stages import EncodedFragment, ReadItem, ShardEnd, read_stage
from vitray.schema import ERROR_SCHEMA, Encoded, End
from vitray.sources import list_shards, read_shard


def spans_of(items: list[ReadItem]) -> list[tuple[int, int]]:
    """The ranges of fragments, each of which has as many images."""
    spans = list[tuple[int, int]]()
    for item in items:
        assert isinstance(item, EncodedFragment)
        span = (item.info.start, item.info.stop)
        assert [image.index for image in item.images] == list(range(*span))
        assert item.info.images == len(item.images)
        spans.append(span)
    return spans


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
    *fragments, last = read_stage(dataset, shard)
    assert spans_of(fragments) == [(0, 4), (4, 8)]
    assert isinstance(last, ShardBroken) and last.shard == shard.id and "one.parquet" in last.why


def test_what_is_no_tar_is_broken_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    (tmp_path / "in" / "zz.tar").write_bytes(b"no tar" * 500)
    shard = list_shards(dataset.job, []).shards[-1]
    (event,) = read_stage(dataset, shard)
    assert isinstance(event, ShardBroken) and "is not a tar" in event.why


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
    items = list(read_stage(dataset, shard))
    assert spans_of(items) == [(0, 4), (4, 8), (8, 10)]
    ends = [item.info.end for item in items if isinstance(item, EncodedFragment)]
    assert ends == [None, None, End(10)]
    assert all(item.info.is_staged for item in items if isinstance(item, EncodedFragment))


@pytest.mark.parametrize("rows", [3, 5, 10, 64])
def test_the_end_comes_with_the_last_fragment(tmp_path: Path, rows: int) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=0, fragment_rows=rows)
    shard = list_shards(dataset.job, []).shards[0]
    items = [item for item in read_stage(dataset, shard) if isinstance(item, EncodedFragment)]
    assert spans_of([*items]) == [
        (start, min(start + rows, 10)) for start in range(0, hand_made.IMAGES, rows)
    ]
    assert [item.info.end for item in items] == [None] * (len(items) - 1) + [End(10)]
    assert [item.info.is_whole_shard for item in items] == [rows >= 10] * len(items)
    assert not any(item.info.is_staged for item in items)


def stage_some(tmp_path: Path, names: set[str]) -> list[ReadItem]:
    """What is read of a shard of which only these staged objects exist."""
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    shard = list_shards(dataset.job, []).shards[0]
    hand_made.stage(dataset, shard)
    staging = tmp_path / "out" / "_vitray" / "staging" / shard.id
    *fragments, end = sorted(staging.iterdir())
    assert len(fragments) == 3 and end.name.startswith("end-")
    by_name = {**{str(n): path for n, path in enumerate(fragments)}, "end": end}
    for name in by_name.keys() - names:
        by_name[name].unlink()
    return list(read_stage(dataset, shard))


def test_what_is_staged_is_not_read_again(tmp_path: Path) -> None:
    skipped, *items = stage_some(tmp_path, {"0"})
    assert isinstance(skipped, FragmentSkipped)
    assert (skipped.start, skipped.stop, skipped.reasons) == (0, 4, {"not_an_image": 1})
    assert spans_of(items) == [(4, 8), (8, 10)]


def test_a_shard_that_is_staged_completely_has_ended(tmp_path: Path) -> None:
    *skipped, ended = stage_some(tmp_path, {"0", "1", "2", "end"})
    assert [(item.start, item.stop) for item in skipped if isinstance(item, FragmentSkipped)] == [
        (0, 4),
        (4, 8),
        (8, 10),
    ]
    assert isinstance(ended, ShardEnded) and ended.end == End(10)


def test_an_end_without_a_fragment_of_its_own_is_handed_on(tmp_path: Path) -> None:
    """All but the end was staged, and fragments divide the shard evenly."""
    hand_made.write_tar(
        tmp_path / "in" / "a.tar", {f"{n}.jpg": f"image {n}".encode() for n in range(8)}
    )
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    (shard,) = list_shards(dataset.job, []).shards
    hand_made.stage(dataset, shard)
    staging = tmp_path / "out" / "_vitray" / "staging" / shard.id
    (end,) = staging.glob("end-*")
    end.unlink()
    first, second, last = read_stage(dataset, shard)
    assert isinstance(first, FragmentSkipped) and isinstance(second, FragmentSkipped)
    assert isinstance(last, ShardEnd) and (last.shard, last.end) == (shard, End(8))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(StorageError("no answer"), ShardFailed), (ObjectChanged("other bytes"), ShardChanged)],
)
def test_a_fault_of_the_store_is_an_outcome_of_the_shard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    expected: type[ShardFailed] | type[ShardChanged],
) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=0)
    shard = list_shards(dataset.job, []).shards[0]

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("vitray.pipeline.stages.read_shard", fails)
    (event,) = read_stage(dataset, shard)
    assert isinstance(event, expected) and event.shard == shard.id
