"""Configs, sources and directories that a training refuses, in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.training_runs import embedded
from vitray.errors import FingerprintError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_directory_of_something_else_is_never_written_into(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    """Of a model the weights would be gone, of one's own folder the README."""
    shutil.copytree(trained, model := tmp_path / "model", ignore=shutil.ignore_patterns("_vitray"))
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    (tmp_path / "own" / "photos").mkdir(parents=True)
    (tmp_path / "own" / "photos" / "README.md").write_text("mine")
    for out, named in (
        (str(model), "README.md"),
        (dataset, "_SUCCESS.json"),
        (str(tmp_path / "own"), "photos/README.md"),
    ):
        before = {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}
        with pytest.raises(
            FingerprintError,
            match=rf"{out} holds files that no training wrote, such as {named}\. Choose an empty",
        ):
            finetune(TrainingConfig(**{**small, "model": str(model), "out": out}))
        assert {
            path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()
        } == before
    begun = (
        tmp_path / "begun" / "_vitray" / "images"
    )  # what a training that was killed while it decoded leaves
    begun.mkdir(parents=True)
    (begun / "x.lock").touch()
    (begun.parent / "probe-1").touch()
    assert (
        finetune(TrainingConfig(**{**small, "epochs": 1, "out": str(tmp_path / "begun")})).epochs
        == 1
    )
