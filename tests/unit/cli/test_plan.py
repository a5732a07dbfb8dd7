"""`vitray plan` counts what a run would do, on every kind of source, and writes nothing."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factories import hand_made
from support.command_line import Call, plan_of, refused, snapshot, write_job
from support.paths import TESTS
from vitray.dataset import append_group_log, committed_files

MODEL = TESTS / "data" / "dataset-v1" / "model"


def test_plan_says_whether_it_compiles_and_refuses_an_engine_without_the_precision(
    vitray: Call, tmp_path: Path
) -> None:
    hand_made.write_tars(tmp_path / "in")
    argv = [f"{tmp_path}/in", "--model", MODEL, "--out", f"{tmp_path}/new"]
    assert plan_of(vitray, *argv)["compile"].startswith(
        "auto: off (30 images; on from 100,000 images per machine or 200,000 per GPU"
    )
    assert plan_of(vitray, *argv, "--set", "compile=on")["compile"] == "on"
    assert plan_of(vitray, *argv, "--set", "compile=on", "--set", "engine=openvino")[
        "compile"
    ].startswith("off: engine openvino")
    for engine, precision, has in (("onnx", "bf16", "fp32"), ("openvino", "fp16", "bf16 or fp32")):
        sets = ["--set", f"engine={engine}", "--set", f"precision={precision}"]
        refused(
            vitray,
            tmp_path,
            ["plan", *argv, *sets],
            2,
            f"engine {engine} computes in {has}, not in {precision}. Set precision",
        )


def test_plan_refuses_what_run_would_and_demo_a_place_that_cannot_be(
    vitray: Call, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").touch()
    code, _, err = vitray(
        "plan", tmp_path / "in", "--model", MODEL, "--out", tmp_path / "in" / "out"
    )
    assert code == 2 and "lies inside `source`" in err
    code, _, err = vitray("demo", tmp_path / "file" / "demo")
    assert (
        code == 1 and err.startswith("StorageError: ") and "cannot be made: Not a directory" in err
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model=none", "ModelError: model none is neither a local directory nor in the cache"),
        ("labels=[cat, dog]", "model without a text tower, so it cannot read `labels`"),
        ("head=nowhere", "nowhere/head.json does not exist"),
        ("embeddings=[{layer: 9}]", "has no layer 9: layers are 1..2 or last"),
        ("top_k=3", "top_k differs (2, this job: 3). Choose another `out`"),
        ("labels=false", "labels differs"),
        ("labels=none.txt", "none.txt does not exist"),
    ],
)
def test_plan_refuses_a_job_that_does_not_fit(
    vitray: Call, tmp_path: Path, change: str, says: str
) -> None:
    hand_made.make_dataset(tmp_path, commit=2, spec=hand_made.checkpoint_spec(tmp_path))
    job = write_job(tmp_path / "job.yaml", top_k=2, embeddings=[{"normalize": True}])
    assert plan_of(vitray, job)["pending"] == 1
    refused(vitray, tmp_path, ["plan", job, "--set", change], 2, says)


def test_plan_refuses_other_weights_and_missing_ones(vitray: Call, tmp_path: Path) -> None:
    hand_made.make_dataset(tmp_path, commit=2, spec=hand_made.checkpoint_spec(tmp_path))
    job = write_job(tmp_path / "job.yaml", top_k=2, embeddings=[{"normalize": True}])
    weights = tmp_path / "model" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-4] + b"\x00\x00\x80\x3f")
    refused(vitray, tmp_path, ["plan", job], 2, "FingerprintError: ", "weights differs")
    weights.unlink()
    refused(vitray, tmp_path, ["plan", job], 2, "ModelError: ", "holds no model.safetensors")
    refused(vitray, tmp_path, ["plan", job, "--out", f"{tmp_path}/new"], 2, "no model.safetensors")


def test_plan_refuses_data_files_of_another_job(vitray: Call, tmp_path: Path) -> None:
    spec = hand_made.checkpoint_spec(tmp_path)
    hand_made.make_dataset(tmp_path, commit=2, spec=spec)
    (tmp_path / "out" / "_vitray" / "dataset.json").unlink()
    job = write_job(tmp_path / "job.yaml", top_k=2, embeddings=[{"normalize": True}])
    assert plan_of(vitray, job)["committed"] == 2  # `auto` may be what these files have
    refused(
        vitray,
        tmp_path,
        ["plan", job, "--set", "top_k=1"],
        2,
        "FingerprintError: ",
        "2 files of another job",
    )


def test_plan_counts_tars_and_what_is_committed(vitray: Call, tmp_path: Path) -> None:
    spec = hand_made.checkpoint_spec(tmp_path)
    dataset = hand_made.make_dataset(tmp_path, commit=2, spec=spec)
    before = snapshot(tmp_path)
    argv = [f"{tmp_path}/in", "--model", f"{tmp_path}/model", *hand_made.SAME_JOB]
    plan = plan_of(vitray, *argv, "--out", f"{tmp_path}/out")
    size = sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert (
        plan["kind"],
        plan["shards"],
        plan["images"],
        plan["images_exact"],
        plan["size_bytes"],
    ) == ("tar", 3, 30, True, size)
    assert (plan["committed"], plan["pending"], plan["pending_images"]) == (2, 1, 10)
    decided = {
        "model": f"{tmp_path}/model",
        "precision": "fp32",
        "engine": "torch",
        "batch_size": "4",
        "fragment_rows": "4",
    }
    assert plan["decided"] == decided
    code, out, _ = vitray("plan", *argv, "--out", f"{tmp_path}/new")
    assert code == 0
    assert out.splitlines()[:3] == [
        f"source     3 tar shards, 30 images, {size / 1000:.1f} kB",
        "committed  0 shards",
        "to do      3 shards, 30 images",
    ]
    assert "precision  chosen by the first run" in out
    none = vitray("plan", *argv, "--out", f"{tmp_path}/new", "--set", "since=2999-01-01")[1]
    assert none.splitlines()[:4] == [
        "source     0 shards, 0 images, 0 bytes",
        "committed  0 shards",
        "selected   since chooses whole shards: 0 of 3 tar shards, about 0 of 30 images",
        "excluded   3 shards with 30 images, by since, sample or limit",
    ]
    assert snapshot(tmp_path) == before
    assert len(committed_files(dataset.out)) == 2


def test_plan_counts_parquet(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n, rows in enumerate((7, 5, 0)):
        table = pa.table({"image": pa.array([b"x"] * rows, pa.binary())})
        pq.write_table(table, tmp_path / "in" / f"{n}.parquet", row_group_size=3)
    plan = plan_of(vitray, f"{tmp_path}/in", "--model", MODEL, "--out", f"{tmp_path}/out")
    size = sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert (plan["kind"], plan["shards"], plan["images"], plan["images_exact"]) == (
        "parquet",
        3,
        12,
        True,
    )
    assert (plan["size_bytes"], plan["committed"], plan["pending_images"], plan["decided"]) == (
        size,
        0,
        12,
        None,
    )


def test_plan_counts_every_byte_of_a_source_cut_into_ranges(vitray: Call, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("path\n" + "".join(f"images/{n:05d}.jpg\n" for n in range(100)))
    plan = plan_of(
        vitray, path, "--model", MODEL, "--out", f"{tmp_path}/out", "--set", "group_size=30"
    )
    assert (plan["kind"], plan["shards"], plan["images"]) == ("manifest", 4, 100)
    assert path.stat().st_size - 4 < int(str(plan["size_bytes"])) <= path.stat().st_size


def test_plan_counts_loose_files_in_the_groups_that_out_remembers(
    vitray: Call, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for n in range(10):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(b"x" * (n + 1))
    argv = [f"{tmp_path}/in", "--model", MODEL, "--out", f"{tmp_path}/out", "--set", "group_size=4"]
    plan = plan_of(vitray, *argv)
    assert (plan["kind"], plan["shards"], plan["images"], plan["size_bytes"]) == (
        "files",
        3,
        10,
        55,
    )
    append_group_log(f"{tmp_path}/out", [(0, f"{tmp_path}/in/{n}.jpg") for n in (0, 9)])
    plan = plan_of(vitray, *argv)
    assert (plan["shards"], plan["images"], plan["images_exact"], plan["pending"]) == (
        3,
        10,
        True,
        3,
    )  # 2 + 4 + 4
    append_group_log(f"{tmp_path}/out", [(1, f"{tmp_path}/in/{n}.jpg") for n in (1, 2)])
    assert plan_of(vitray, *argv)["shards"] == 4  # 2 + 2 + 4 + 2
