"""`vitray finetune` as a user sees it: flags, progress, the label of a probe, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from factories import digits
from support.command_line import Call, subprocess_vitray, vitray
from support.reports import Tables
from support.training_runs import embedded

__all__ = ["vitray"]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_flags_alone_train_with_progress_from_the_start_and_no_warning_of_libraries(
    small: dict[str, object], tmp_path: Path
) -> None:
    photos = digits.folders(tmp_path / "photos", digits.few(8, [0, 1]))
    flags = {
        "--source": photos,
        "--model": small["model"],
        "--out": tmp_path / "out",
        "--train": "full",
        "--init": "scratch",
        "--epochs": 2,
        "--batch-size": 4,
        "--validation": 0.3,
        "--device": "cpu",
    }
    words = [word for flag in flags.items() for word in flag]
    done = subprocess_vitray("finetune", *words)
    assert done.returncode == 0, done.stderr
    assert "vitray run SOURCE --model" in done.stdout and Path(tmp_path, "out/config.json").exists()
    lines = done.stderr.splitlines()
    progress = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line for line in lines if not line.startswith("{")] == [
        line for line in lines if re.match(r"epoch [12]: loss ", line)
    ]
    phases = [line["phase"] for line in progress]
    assert list(dict.fromkeys(phases)) == [
        "starting",
        "reading the model",
        "reading the source",
        "decoding the images",
        "opening the model",
        "training",
        "measuring the held-out images",
        "writing the checkpoint",
    ]
    assert all(line["percent"] is not None for line in progress if line["phase"] == "training")


def test_a_probe_needs_a_label_and_its_page_shows_the_sweep_and_pictures(
    vitray: Call, trained: str, tmp_path: Path
) -> None:
    source = digits.folders(tmp_path / "photos", digits.few(20))
    dataset = embedded(trained, source, tmp_path / "dataset", keep=["folder"])
    out = tmp_path / "probe"
    probe = ["finetune", "--dataset", dataset, "--train", "probe", "--out", out]
    code, text, err = vitray(*probe)
    assert (code, text) == (2, "") and not out.exists()
    assert "`label` is missing" in err and "are `folder`" in err and "`label: label`" in err
    code, text, _ = vitray(*probe, "--label", "folder", "--validation", 0.3)
    assert code == 0
    page = (out / "report.html").read_text()
    rows = Tables(page).tables["Figures by regularisation strength"]
    assert len(rows) == 7 and sum("chosen" in row[0] for row in rows) == 1
    assert 'id="curves"' not in page
    assert page.count("data:image/jpeg") > 5 and "no picture of" not in page
    report = tmp_path / "page.html"
    code, text, _ = vitray("report", dataset, "--truth", "folder", "--to", report)
    assert code == 0 and "Accuracy" in report.read_text()


def test_a_probe_learns_the_models_own_labels_only_when_asked(
    vitray: Call, trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    probe = ["finetune", "--dataset", dataset, "--train", "probe"]
    code, _, _ = vitray(*probe, "--label", "label", "--out", tmp_path / "out")
    assert code == 0
    assert "another model's" in " ".join((tmp_path / "out/README.md").read_text().split())
