"""`vitray run --try N`: the first images, labelled in a folder of their own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from factories.shards import pictures, put_tars
from support.command_line import Call, snapshot

ENGINE = ["--engine", "torch", "--device", "cpu"]


def test_a_trial_labels_the_first_images_and_prints_its_folder(
    vitray: Call, shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(30), 3, tmp_path)
    before = snapshot(tmp_path)
    code, out, _ = vitray("run", f"{tmp_path}/in", "--model", shapes_model, "--try", "20", *ENGINE)
    assert code == 0
    *rows, tried, dataset = out.splitlines()
    assert len(rows) == 20 and tried.startswith("tried 20 images in ")
    out_dir = dataset.split()[1]
    assert dataset == f"dataset: {out_dir} (delete {os.path.dirname(out_dir)} when you are done)"
    assert snapshot(tmp_path) == before
    # the labels are those of a run over everything
    assert vitray("run", f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/all", *ENGINE)[0] == 0  # fmt: skip
    labels = {
        row["key"]: row["label"]
        for row in pq.read_table(f"{tmp_path}/all/data", columns=["key", "label"]).to_pylist()
    }
    tried_labels = {
        row["key"]: row["label"]
        for row in pq.read_table(f"{out_dir}/data", columns=["key", "label"]).to_pylist()
    }
    assert len(tried_labels) == 20 and tried_labels.items() <= labels.items()
    assert vitray("validate", out_dir, "--content")[0] == 0
    shutil.rmtree(os.path.dirname(out_dir))


def test_a_trial_shows_bad_images_and_needs_no_out(
    vitray: Call, shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(4), 1, tmp_path)
    shutil.unpack_archive(next(Path(tmp_path, "in").glob("*.tar")), tmp_path / "files")
    (tmp_path / "files" / "zz.jpg").write_bytes(b"no image")
    argv = ["run", f"{tmp_path}/files", "--model", shapes_model, "--try", "9", *ENGINE]
    code, out, _ = vitray(*argv, "--json")
    trial = json.loads(out)
    assert (code, trial["images"], trial["errors"]) == (0, 5, 1)
    assert trial["rows"][-1]["reason"] == "not_an_image"
    assert all(row["label"] for row in trial["rows"][:-1])
    shutil.rmtree(os.path.dirname(trial["out"]))


@pytest.mark.parametrize(
    ("option", "value"), [("--max-cost", "3"), ("--prune", None), ("--address", "h:1")]
)
def test_a_trial_refuses_options_that_it_would_ignore(
    vitray: Call, tmp_path: Path, option: str, value: str | None
) -> None:
    given = [option] if value is None else [option, value]
    code, out, err = vitray("run", tmp_path, "--model", "m", "--try", "2", *given)
    assert (code, out) == (2, "") and err.startswith(f"JobError: {option}: --try labels a few")


def test_a_trial_does_not_mind_the_webhook_of_the_environment(
    vitray: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAY_NOTIFY", "http://127.0.0.1:1/")
    code, _, err = vitray("run", tmp_path / "none", "--model", "m", "--try", "2")
    assert code == 2 and "none" in err and "--notify" not in err and "VITRAY" not in err


def test_a_trial_that_fails_leaves_no_folder(
    vitray: Call, shapes_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = vitray("run", f"{tmp_path}/none", "--model", shapes_model, "--try", "2")
    assert (code, out) == (2, "") and err.startswith("SourceError: ")
    assert list(tmp_path.iterdir()) == []
