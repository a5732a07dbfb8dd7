"""Small folders to train on, a finished training, and trainings that are stopped or killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitray
from factories import digits
from vitray.schema import PixelSpec
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

TRAINED = {"epochs": 25, "batch_size": 16, "lr": 3e-3}

PIXELS = PixelSpec((16, 16), 2, None, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A config of a second: 200 digits, a ViT of two narrow layers, from scratch."""
    folder = tmp_path_factory.mktemp("small")
    source = digits.tar(folder / "digits.tar", digits.few(20))
    model = digits.model(folder / "model", width=32, layers=2)
    fields = {
        "source": source,
        "model": model,
        "train": "full",
        "init": "scratch",
        "epochs": 3,
        "validation": 0.2,
        "device": "cpu",
    }
    return {**digits.CONFIG, **fields, "batch_size": 32}


@pytest.fixture(scope="module")
def trained(small: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> str:
    """OUT of the small config."""
    out = str(tmp_path_factory.mktemp("trained") / "out")
    finetune(TrainingConfig(**{**small, **TRAINED, "out": out}))
    return out


def weights(out: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}/model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def start(config: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "vitray", "finetune", str(config)],
        env=known,
        capture_output=True,
        text=True,
        timeout=120,
    )


def write_config(path: Path, fields: dict[str, object]) -> Path:
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    return path


def embedded(
    model: str, source: object, out: Path | str, engine: str = "torch", **more: object
) -> str:
    fields = {"keep": ["cls"], "precision": "fp32", **more}
    job = vitray.Job(source=source, model=model, out=str(out), engine=engine, **fields)
    vitray.run(job)
    return job.out
