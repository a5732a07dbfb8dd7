"""Counts of what has no row survive a resume, and rules of old datasets stay as they were."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from factories import hand_made
from support.passthrough import ZeroModel
from support.user_inputs import job_for, jpg, write_files
from vitray.dataset import commit_shard, open_dataset, read_footer, resolve_dataset
from vitray.decoding.decode import decode_bytes
from vitray.errors import JobError, StorageError
from vitray.left_out import LEFT_OUT, LeftOut, describe
from vitray.operations.validation import validate
from vitray.pipeline.events import FragmentSkipped, ShardEnded
from vitray.pipeline.stages import (
    EncodedFragment,
    decode_stage,
    predict_stage,
    read_stage,
    write_stage,
)
from vitray.schema import DecodeSpec, PixelSpec, VectorColumn
from vitray.sources import list_shards, read_shard


def test_every_reason_is_explained() -> None:
    assert list(LEFT_OUT) == list(LeftOut)
    assert (
        describe({"hidden": 2, "other_suffix": 3}, {".txt": 3})
        == "5: 2 hidden, 3 other_suffix; by suffix: 3 .txt"
    )
    assert describe({}) == "0: "


def tiff(pages: int) -> bytes:
    buffer = io.BytesIO()
    images = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(pages)]
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("staged", [0, 1, 2, 3])
def test_counts_survive_a_resume(tmp_path: Path, staged: int) -> None:
    """staged: the number of fragments that a run staged before it died."""
    images = [[tiff(n % 3 + 1)] * (n % 4 + 1) for n in range(6)]
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(
        pa.table({"images": images, "mask": [None, *[jpg(1)] * 5]}), source / "a.parquet"
    )
    job = hand_made.job_of(
        tmp_path, source=str(source), fragment_rows=2, source_rules=2, image_column="images"
    )
    (shard,) = list_shards(job, []).shards
    vector = VectorColumn("embedding", hand_made.DIMENSION, None, "cls", True, "float32")
    dataset = resolve_dataset(
        job, hand_made.spec_of("m"), [vector], pa.schema([]), "2026-01-01T00:00:00+00:00"
    )
    for fragments_left in (staged, 99):
        for item in read_stage(dataset, shard):
            if isinstance(item, EncodedFragment):
                if fragments_left == 0:
                    break
                fragments_left -= 1
                block = decode_stage(dataset, [item])
                for fragment in predict_stage(dataset, ZeroModel(), block):
                    write_stage(dataset, fragment)
            else:
                assert isinstance(item, (FragmentSkipped, ShardEnded)), item
    assert commit_shard(dataset, shard) is not None
    footer = read_footer(dataset.data_url(shard.id))
    further = sum(len(row) - 1 for row in images) + 5
    assert footer.left_out == {
        "further_image": further,
        "further_page": sum(n % 3 for n in range(6)),
    }
    checked = validate(dataset.out, content=True)
    assert checked.ok, checked


def test_counts_that_are_wrong_are_found(tmp_path: Path) -> None:
    hand_made.write_tar(
        tmp_path / "in" / "a.tar",
        {"0.jpg": b"1", "0.depth.png": b"2", "1.jpg": b"3", "1.depth.png": b"4"},
    )
    job = hand_made.job_of(tmp_path, source=f"{tmp_path}/in/a.tar")
    dataset = hand_made.make_dataset(
        tmp_path, source=str(job.source[0])
    )  # whose hand-made footers count nothing
    (problem,) = validate(dataset.out).problems
    assert "the source has 2: 2 further_image without a row, the dataset counted 0: " in problem


def test_a_dataset_json_that_another_process_took_away_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    monkeypatch.setattr(
        "vitray.pipeline.runner.require_own_data_files",
        lambda dataset: os.unlink(f"{dataset.out}/_vitray/dataset.json"),
    )
    result = vitray.run(job_for(folder, tmp_path / "out"))
    assert result.rows == 1 and open_dataset(result.out) is not None and validate(result.out).ok


def test_a_first_run_that_fails_with_staged_fragments_blocks_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {f"{n:02d}.jpg": jpg(n) for n in range(20)})

    def refuse(*_: object) -> None:
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("vitray.pipeline.stages.commit_shard", refuse)
        with pytest.raises(StorageError):
            vitray.run(job_for(folder, tmp_path / "out", fragment_rows=4, group_size=10))
    os.unlink(tmp_path / "out" / "_vitray" / "dataset.json")
    result = vitray.run(job_for(folder, tmp_path / "out", fragment_rows=64, group_size=10))
    assert (result.exit_code, result.rows, result.shards) == (0, 20, 2), (
        "fragments of another length are made anew"
    )
    with monkeypatch.context() as patched:
        patched.setattr("vitray.pipeline.stages.commit_shard", refuse)
        with pytest.raises(StorageError):
            vitray.run(job_for(folder, tmp_path / "other", fragment_rows=4, group_size=10))
    result = vitray.run(job_for(folder, tmp_path / "other", top_k=2, group_size=20))
    assert (result.exit_code, result.rows, result.shards) == (0, 20, 1), (
        "nor do its groups bind another job"
    )


def test_a_source_json_that_is_damaged_is_ignored(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    vitray.run(job_for(folder, tmp_path / "out"))
    for text in ("{", "[]", '{"limit": "no number"}', '{"left_out": 7, "kind": []}', "[" * 100_000):
        (tmp_path / "out" / "_vitray" / "source.json").write_text(text)
        assert vitray.run(job_for(folder, tmp_path / "out")).rows == 1


def test_old_source_rules_decode_as_they_did(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 1200, dtype=np.uint16).reshape(30, 40)
    negative, raw = io.BytesIO(), io.BytesIO()
    Image.fromarray(values).save(negative, "TIFF", tiffinfo={262: 0})
    Image.new("RGB", (8, 8), "red").save(raw, "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    pixels = PixelSpec((4, 4), 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    reasons_by_rules = {}
    for rules in (1, 2):
        spec = DecodeSpec(pixels, ("tiff",), 1_000_000, None, rules=rules)
        decoded, outcomes = decode_bytes([negative.getvalue(), raw.getvalue()], spec)
        reasons_by_rules[rules] = (decoded[0, 0, 0, 0] > 128, outcomes[1].reason)
    assert reasons_by_rules == {1: (False, None), 2: (True, "format_not_allowed")}


def test_old_source_rules_read_manifests_as_they_did(tmp_path: Path) -> None:
    write_files(
        tmp_path,
        {"a.jpg": b"x", "list.csv": b"path,t\na.jpg," + b"x" * 200_000 + b"\nimg\\a.jpg,\xe9\n"},
    )
    for rules, reasons in ((1, ["missing", "missing"]), (2, [None, "missing"])):
        job = job_for(tmp_path / "list.csv", tmp_path / "out", source_rules=rules, keep="t")
        (shard,) = list_shards(job, []).shards
        *rows, _ = read_shard(shard, job, lambda index: True)
        assert [row.reason for row in rows] == reasons
        assert rows[1].passthrough.batch["t"].to_pylist() == ["\ufffd" if rules == 1 else "é"]
    write_files(tmp_path / "globs", {"xa.jpg": b"x"})
    assert (
        len(
            list_shards(
                job_for(f"{tmp_path}/globs/x**.jpg", tmp_path / "out", source_rules=1), []
            ).shards
        )
        == 1
    )
    with pytest.raises(JobError, match="stands for whole folders"):
        list_shards(job_for(f"{tmp_path}/globs/x**.jpg", tmp_path / "out"), [])
