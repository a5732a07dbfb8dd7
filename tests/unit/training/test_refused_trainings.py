"""Configs, sources and directories that a training refuses, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.training_runs import write_config
from vitray.training.config import TrainingConfig, load_config

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_config_file_and_its_overrides(tmp_path: Path) -> None:
    path = write_config(
        tmp_path / "job.yaml", {"source": "in", "model": "m", "out": "o", "train": "lora"}
    )
    config = load_config(path, {"rank": 4})
    assert (config.train, config.rank, config.rate, config.label_column) == (
        "lora",
        4,
        1e-3,
        "folder",
    )
    assert all((field.description or "").strip() for field in TrainingConfig.model_fields.values())
