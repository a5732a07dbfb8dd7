"""What a first run settles, and what later files and runs may change."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from support.user_inputs import job_for, jpg, label, write_files, write_tar
from vitray.errors import JobError, ShardError, SourceError
from vitray.operations.planning import status


def test_a_new_first_tar_with_several_plain_images_is_set_aside_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "b.tar", {"0.jpg": jpg(1)})
    label(tmp_path / "in", tmp_path / "out")
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(2), "0.webp": jpg(3, "WEBP")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    assert (labelled.result.exit_code, labelled.result.rows, len(labelled.result.set_aside)) == (
        3,
        1,
        1,
    )


def test_a_later_tar_with_several_plain_images_is_set_aside_and_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(1)})
    write_tar(tmp_path / "in" / "b.tar", {"0.jpg": jpg(2), "0.webp": jpg(3, "WEBP")})
    labelled = label(tmp_path / "in", tmp_path / "out")
    (why,) = labelled.result.set_aside.values()
    assert labelled.result.exit_code == 3 and "jpg, webp. Set `image_member`" in why
    assert why in str(status(labelled.result.out))


def test_a_file_without_a_passthrough_column_is_set_aside_wherever_it_comes(tmp_path: Path) -> None:
    for n, names in enumerate((["image"], ["image", "caption"])):
        for order in ("ab", "ba"):
            path = tmp_path / order / f"{order[n]}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(
                pa.table({name: [jpg(n)] if name == "image" else ["x"] for name in names}), path
            )
    for order in ("ab", "ba"):
        labelled = label(tmp_path / order, tmp_path / f"out-{order}", keep="caption")
        assert (
            labelled.result.exit_code,
            labelled.result.rows,
            len(labelled.result.set_aside),
        ) == (3, 1, 1)
    with pytest.raises(JobError, match="no column `captoin`"):
        vitray.run(job_for(tmp_path / "ab", tmp_path / "out", keep="captoin"))


def test_types_are_wide_enough_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n, kind in enumerate((pa.int32(), pa.int64(), pa.int8())):
        pq.write_table(
            pa.table({"image": [jpg(n)], "n": pa.array([n + 100], kind)}),
            tmp_path / "in" / f"{n}.parquet",
        )
    labelled = label(tmp_path / "in", tmp_path / "out", keep="n")
    assert [row["n"] for row in labelled.rows] == [100, 101, 102] and labelled.result.exit_code == 0
    kinds = {pq.read_schema(path).field("n").type for path in (tmp_path / "out" / "data").iterdir()}
    assert kinds == {pa.int64()}


def test_readers_of_a_directory_see_good_rows_alone(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.jpg": jpg(1), "b.jpg": b"no image", "c.jpg": jpg(2)})
    labelled = label(tmp_path / "in", tmp_path / "out")
    frame = pd.read_parquet(tmp_path / "out")
    assert list(frame["key"]) == labelled.keys and not frame["label"].isna().any()
    assert len(labelled.errors) == 1 and not (tmp_path / "out" / "errors").exists()


@pytest.mark.parametrize(
    "name", ["labels.csv", "more.tar", "x.parquet", "old.tar.gz", "list.jsonl"]
)
def test_a_file_of_another_kind_does_not_stop_the_next_run(tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    assert label(folder, tmp_path / "out").result.left_out == {}
    write_files(folder, {name: b"path\nx\n", "b.jpg": jpg(2)})
    labelled = label(folder, tmp_path / "out")
    assert sorted(labelled.names) == ["a.jpg", "b.jpg"]
    assert labelled.result.exit_code == 0 and labelled.result.left_out == {"other_kind": 1}
    with pytest.raises(SourceError, match=r"is a mix|compressed"):
        vitray.run(job_for(folder, tmp_path / "new"))
    os.unlink(folder / "a.jpg")
    os.unlink(folder / "b.jpg")
    with pytest.raises(SourceError, match="holds nothing of format files"):
        vitray.run(job_for(folder, tmp_path / "out"))  # it does not become a dataset of that kind
    elsewhere = write_files(
        tmp_path / "elsewhere", {"a.tar": b"", "b.tar": b"", "preview.jpg": jpg(3)}
    )
    with pytest.raises(SourceError, match="is a mix"):
        vitray.run(
            job_for(elsewhere, tmp_path / "out")
        )  # another source: nothing is known of its kind


def test_a_first_run_that_fails_binds_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})

    def refuse(*_: object) -> None:
        raise ShardError("the first run fails here")

    with monkeypatch.context() as patched:
        patched.setattr("vitray.pipeline.runner.require_own_data_files", refuse)
        with pytest.raises(ShardError):
            vitray.run(job_for(folder, tmp_path / "out", top_k=1))
    assert status(str(tmp_path / "out")).last_run["ended"] == "ShardError: the first run fails here"
    assert label(folder, tmp_path / "out", top_k=2).result.rows == 1


def test_a_first_run_that_committed_nothing_binds_no_later_one(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.tar": b"no tar at all, but long enough" * 99})
    first = vitray.run(job_for(tmp_path / "in", tmp_path / "out", top_k=1))
    assert (first.exit_code, first.shards) == (3, 0)
    write_tar(tmp_path / "in" / "a.tar", {"0.jpg": jpg(1)})
    assert label(tmp_path / "in", tmp_path / "out", top_k=2).result.rows == 1
    with pytest.raises(JobError, match="top_k differs"):
        vitray.run(job_for(tmp_path / "in", tmp_path / "out", top_k=1))


def test_a_lost_dataset_json_is_created_again(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", {"a.jpg": jpg(1)})
    label(folder, tmp_path / "out")
    document = tmp_path / "out" / "_vitray" / "dataset.json"
    document.write_bytes(b"{")
    with pytest.raises(vitray.errors.StorageError, match="move it away and run the same job again"):
        vitray.run(job_for(folder, tmp_path / "out"))
    os.unlink(document)
    assert label(folder, tmp_path / "out").result.rows == 1
    with pytest.raises(JobError, match="another job"):
        os.unlink(document)
        vitray.run(job_for(folder, tmp_path / "out", top_k=1))
