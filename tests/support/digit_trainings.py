"""Trainings on handwritten digits, and the tars that they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from factories import digits
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

SHOTS = 50  # of each digit


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.tar, shots.tar (50 a class, of train), eight.tar (train, without 8 and 9), unseen.tar;
    model/ without weights.
    """
    folder = tmp_path_factory.mktemp("digits")
    digits.tar(folder / "train.tar", digits.few(digits.TRAINED))
    digits.tar(folder / "shots.tar", digits.few(SHOTS))
    digits.tar(folder / "eight.tar", digits.few(digits.TRAINED, range(8)))
    digits.tar(folder / "unseen.tar", digits.few(1000, skip=digits.TRAINED))
    digits.model(folder / "model")
    digits.model(folder / "wide", width=128, layers=3)
    return folder


def train(home: Path, name: str, **fields: object) -> str:
    out = str(home / name)
    source = (
        {}
        if fields.get("dataset")
        else {"source": str(home / "train.tar"), "model": str(home / "model")}
    )
    return finetune(TrainingConfig(**{**source, **fields, "out": out})).out
