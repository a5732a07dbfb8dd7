"""`vitray finetune`: its flags, and what it shows while it trains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from support.command_line import Call
from vitray.cli.finetune import PANELS, config_of
from vitray.cli.training_view import TrainingClock, TrainingView
from vitray.errors import JobError
from vitray.training.activity import Activity, Phase
from vitray.training.config import TrainingConfig


def test_every_field_has_a_flag_and_the_help_lists_it(vitray: Call) -> None:
    names = [name for panel in PANELS.values() for name in panel]
    assert sorted(names) == sorted(TrainingConfig.model_fields)
    code, out, _ = vitray("finetune", "--help")
    assert code == 0 and "[JOB.yaml|SOURCE]" in out
    flags = {word.rstrip(",") for line in out.splitlines() for word in line.split()[:2]}
    assert {f"--{name.replace('_', '-')}" for name in names} <= flags
    assert "source, label, model, out, train" in " ".join(out.split())


@pytest.mark.parametrize(
    ("target", "fields", "expected"),
    [
        (None, {"source": "in", "model": "m", "out": "o"}, ("in", "m", "o", 20)),
        ("in", {"model": "m", "out": "o", "epochs": 3}, ("in", "m", "o", 3)),
        ("job.yaml", {}, ("a", "b", "c", 20)),
        ("job.yaml", {"out": "o", "epochs": 3}, ("a", "b", "o", 3)),
        ("job.yaml", {"source": "in"}, ("in", "b", "c", 20)),
    ],
)
def test_a_file_a_source_or_flags_alone_describe_a_training(
    target: str | None,
    fields: dict[str, object],
    expected: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("source: a\nmodel: b\nout: c\n")
    config = config_of(target, fields)
    assert ([expected[0]], *expected[1:]) == (
        config.source,
        config.model,
        config.out,
        config.epochs,
    )


def test_a_source_that_is_given_twice_is_refused() -> None:
    with pytest.raises(JobError, match="`source` is given twice"):
        config_of("in", {"source": "other", "model": "m", "out": "o"})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "`out` is missing"),
        (["photos", "--out", "o"], "`model` is missing"),
        (["--model", "m", "--out", "o"], "`source` is missing"),
        (["photos", "--model", "m", "--out", "o", "--epochs", "none"], "epochs"),
        (["photos", "--model", "m", "--out", "o", "--rank", "4"], "rank is for train: lora"),
    ],
)
def test_a_training_that_is_not_valid_is_one_line(
    vitray: Call, argv: list[object], message: str
) -> None:
    code, out, err = vitray("finetune", *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@dataclass
class Time:
    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_progress_has_a_phase_a_percentage_and_the_time_left() -> None:
    time = Time()
    clock = TrainingClock(time)
    assert json.loads(clock.line()) | {"at": ""} == {
        "schema": "vitray/training-progress/v1",
        "at": "",
        "phase": "starting",
        "percent": None,
        "images": 0,
        "detail": "",
        "eta_s": None,
    }
    clock.update(Activity(Phase.READING_SOURCE))
    assert (clock.phase, clock.text()) == ("reading the source", "")
    # a training that goes on at 50%: the time left follows from what this call did
    clock.update(Activity(Phase.TRAINING, 100, 200, 100, "epoch 2 of 2, step 3 of 4"))
    assert clock.text() == "50.0%  epoch 2 of 2, step 3 of 4"
    time.seconds = 30
    clock.update(Activity(Phase.TRAINING, 150, 200, 150, "epoch 2 of 2, step 4 of 4"))
    assert clock.text() == "75.0%  epoch 2 of 2, step 4 of 4  0:00:30 left"
    line = json.loads(clock.line())
    assert (line["phase"], line["percent"], line["images"], line["eta_s"]) == (
        "training",
        75.0,
        150,
        30,
    )


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_shows_one_line(width: int) -> None:
    time = Time()
    clock = TrainingClock(time)
    clock.update(Activity(Phase.TRAINING, 0, 2000, 0, "epoch 1 of 20, step 1 of 600"))
    time.seconds = 12
    clock.update(Activity(Phase.TRAINING, 700, 2000, 700, "epoch 7 of 20, step 210 of 600"))
    console = Console(width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(TrainingView(clock))
    text = capture.get()
    assert text.count("\n") == 1
    assert "training… 12 s" in text and "35.0%" in text and "epoch 7" in text
