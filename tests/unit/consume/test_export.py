"""vitray export: what other tools read is what the dataset holds, row for row, and it appears whole
or not at all.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from factories import embedded, hand_made
from factories.embedded import HOSTILE, noise
from factories.hand_made import finish_with
from support.exports import made
from vitray import cli
from vitray.consume import exporting
from vitray.consume.exporting import WRITERS, ExportOptions, export
from vitray.dataset import Dataset
from vitray.errors import JobError
from vitray.schema import Encoded, content_hash
from vitray.sources import list_shards, read_shard


def vectors_of(dataset: Dataset, column: str = "embedding") -> np.ndarray:
    return np.stack(vitray.read(dataset.out)[column].to_numpy())


def assert_keys(file: Path, dataset: Dataset) -> None:
    table = vitray.read(dataset.out)
    names = [name for name in table.column_names if not name.startswith("embedding")]
    assert (
        pq.read_table(file)
        .cast(pa.schema([dataset.schema.field(n) for n in names]))
        .equals(table.select(names))
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_npy_is_the_column_bit_for_bit_in_the_order_of_its_keys(tmp_path: Path, dtype: str) -> None:
    dataset, into = made(tmp_path, dtype), tmp_path / "into"
    result = export(dataset.out, str(into), ExportOptions("npy"))
    assert (result.rows, result.missing, result.complete) == (39, 0, True)
    matrix = np.load(into / "vectors.npy", mmap_mode="r")
    assert matrix.dtype == dtype and matrix.flags["C_CONTIGUOUS"]
    assert np.array_equal(matrix, vectors_of(dataset))
    assert_keys(into / "keys.parquet", dataset)
    marks = json.loads((into / "_EXPORT.json").read_text())
    assert marks == {
        **{"source": dataset.out, "fingerprint": dataset.fingerprint, "to": "npy"},
        **{"complete": True, "rows": 39, "missing": 0},
    }


def test_of_several_columns_npy_and_faiss_want_one(tmp_path: Path) -> None:
    dataset = made(tmp_path, more=["other"])
    with pytest.raises(JobError, match="embedding_first, embedding_other: choose one by `column`"):
        export(dataset.out, str(tmp_path / "into"), ExportOptions("npy"))
    export(dataset.out, str(tmp_path / "into"), ExportOptions("npy", column="embedding_other"))
    assert np.array_equal(
        np.load(tmp_path / "into/vectors.npy"), vectors_of(dataset, "embedding_other")
    )


def test_faiss_finds_every_row_under_its_place_in_keys(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    dataset, into = made(tmp_path, "float16"), tmp_path / "into"
    assert export(dataset.out, str(into), ExportOptions("faiss")).rows == 39
    vectors = vectors_of(dataset).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines, ids = faiss.read_index(str(into / "index.faiss")).search(unit, 3)
    expected = np.argsort(-(unit @ unit.T), axis=1)[:, :3]
    assert np.array_equal(ids, expected) and cosines[:, 0] == pytest.approx(1, abs=1e-5)
    assert_keys(into / "keys.parquet", dataset)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_gives_back_hostile_keys_as_they_are_and_vectors_to_the_bit(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    table = vitray.read(dataset.out).to_pylist()
    export(dataset.out, str(tmp_path / "plain"), ExportOptions("csv"))
    rows = read_csv(tmp_path / "plain/rows.csv")
    assert [row["key"] for row in rows] == [
        row["key"] for row in table
    ] and "embedding" not in rows[0]
    for exported, row in zip(rows, table):
        assert (exported["shard"], int(exported["index"]), exported["uri"]) == (
            row["shard"],
            row["index"],
            row["uri"],
        )
        assert (exported["label"], float(exported["score"]), exported["format"]) == (
            row["label"],
            row["score"],
            "jpeg",
        )
        assert bytes.fromhex(exported["content_hash"]) == row["content_hash"]
        assert json.loads(exported["top_labels"]) == row["top_labels"]
    export(dataset.out, str(tmp_path / "vectors"), ExportOptions("csv", vectors=True))
    vectors = [json.loads(row["embedding"]) for row in read_csv(tmp_path / "vectors/rows.csv")]
    assert np.array_equal(np.array(vectors, np.float32), vectors_of(dataset))


def test_webdataset_holds_the_bytes_that_were_labelled_under_names_of_our_own(
    tmp_path: Path,
) -> None:
    dataset, into = made(tmp_path), tmp_path / "into"
    assert export(dataset.out, str(into), ExportOptions("webdataset")).rows == 39
    table = vitray.read(dataset.out)
    scalars = [
        {**row, "content_hash": row["content_hash"].hex()}
        for row in table.drop_columns(["embedding"]).to_pylist()
    ]
    members: dict[str, bytes] = {}
    for path in sorted(into.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.isfile() and member.name not in members
                members[member.name] = tar.extractfile(member).read()
    names = [f"{s:06d}-{n:08d}" for s, count in enumerate((len(HOSTILE), 30)) for n in range(count)]
    assert list(members) == [f"{name}.{suffix}" for name in names for suffix in ("jpeg", "json")]
    for name, row in zip(names, scalars):
        assert json.loads(members[f"{name}.json"]) == row
        assert content_hash(members[f"{name}.jpeg"]).hex() == row["content_hash"]
    job = vitray.Job(
        source=f"{into}/*.tar", model="m", out=str(tmp_path / "new")
    )  # vitray reads its own export
    images = [
        i
        for s in list_shards(job, []).shards
        for i in read_shard(s, job, lambda _: True)
        if isinstance(i, Encoded)
    ]
    assert [image.key for image in images] == names


def test_images_that_changed_or_went_are_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = embedded.make(tmp_path, [noise(4, seed=1), noise(3, seed=2), noise(2, seed=3)])
    (tmp_path / "in/s-001.tar").unlink()
    path = tmp_path / "in/s-002.tar"
    status, body = path.stat(), path.read_bytes()
    path.write_bytes(body.replace(b"image 2 1", b"other 2 1"))
    os.utime(
        path, ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # the same version, as far as a listing tells
    monkeypatch.setattr(
        sys,
        "argv",
        ["vitray", "export", dataset.out, "--to", "webdataset", "--into", str(tmp_path / "into")],
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    ids = sorted(set(vitray.read(dataset.out)["shard"].to_pylist()))
    assert (
        f"missing: 4 images of the dataset could not be read again unchanged, such as {ids[1]} "
        f"0, {ids[1]} 1" in capsys.readouterr().out
    )
    kept = []
    for path in sorted((tmp_path / "into").glob("*.tar")):
        with tarfile.open(path) as tar:
            kept += [name for name in tar.getnames() if name.endswith("json")]
    assert kept == [
        "000000-00000000.json",
        "000000-00000001.json",
        "000000-00000002.json",
        "000000-00000003.json",
        "000002-00000000.json",
    ]
    assert json.loads((tmp_path / "into/_EXPORT.json").read_text())["missing"] == 4


@pytest.mark.parametrize("to", sorted(WRITERS))
def test_nothing_is_overwritten_and_a_death_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    dataset, into = made(tmp_path), tmp_path / "into"
    into.mkdir()
    with pytest.raises(JobError, match="exists already"):
        export(dataset.out, str(into), ExportOptions(to))
    into.rmdir()
    names = sorted(path.name for path in tmp_path.iterdir())
    real = exporting.row_blocks

    def dying(*args: object) -> object:
        yield from real(*args)
        raise RuntimeError("a death")

    monkeypatch.setattr(exporting, "row_blocks", dying)
    with pytest.raises(Exception, match="a death"):
        export(dataset.out, str(into), ExportOptions(to))
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("to", sorted(WRITERS))
def test_a_dataset_without_a_row_is_exported_too(tmp_path: Path, to: str) -> None:
    dataset = embedded.make(tmp_path, [noise(3)], commit=0)
    finish_with(dataset, [], [])
    assert export(dataset.out, str(tmp_path / "into"), ExportOptions(to)).rows == 0
    if to == "npy":
        assert np.load(tmp_path / "into/vectors.npy").shape == (0, 8)
    if to == "csv":
        assert (tmp_path / "into/rows.csv").read_text().startswith('"key","shard","index"')


def test_a_dataset_that_is_not_complete_is_refused_or_told(tmp_path: Path) -> None:
    dataset = made(tmp_path, commit=1)
    with pytest.raises(JobError, match="is not complete"):
        export(dataset.out, str(tmp_path / "into"), ExportOptions("npy"))
    result = export(dataset.out, str(tmp_path / "into"), ExportOptions("npy", partial=True))
    assert (result.rows, result.complete) == (len(HOSTILE), False) and "NOT complete" in str(result)
    assert json.loads((tmp_path / "into/_EXPORT.json").read_text())["complete"] is False


def test_what_cannot_be_done_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    for into, to, message in (
        (f"{dataset.out}/x", "npy", "lies inside the dataset"),
        ("s3://bucket/x", "npy", "an export is a local folder"),
        (str(tmp_path / "x"), "xlsx", "choose one of lance, faiss, npy, webdataset, csv"),
    ):
        with pytest.raises(JobError, match=message):
            export(dataset.out, into, ExportOptions(to))
    for module, to, extra in (("faiss", "faiss", "search"), ("lancedb", "lance", "lance")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(
            JobError, match=rf"--to {to} needs {module}: pip install 'vitray\[{extra}\]'"
        ):
            export(dataset.out, str(tmp_path / "x"), ExportOptions(to))
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".tmp-*"))


def test_bad_images_are_in_no_export(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)  # one bad image in each of three shards
    export(dataset.out, str(tmp_path / "into"), ExportOptions("webdataset"))
    with tarfile.open(tmp_path / "into/000001.tar") as tar:
        rows = [
            json.load(io.BytesIO(tar.extractfile(m).read())) for m in tar if m.name.endswith("json")
        ]
    assert [row["index"] for row in rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
