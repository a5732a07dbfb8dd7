"""Configs, sources and directories that a training refuses, in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import vitray
from factories import digits
from factories.small_models import edit
from support.training_runs import embedded
from vitray.errors import FingerprintError, JobError, ModelError
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


def test_more_blocks_than_there_are_and_columns_of_loose_files_are_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    fields = {
        **small,
        "model": trained,
        "init": "weights",
        "train": "last",
        "out": str(tmp_path / "a"),
    }
    with pytest.raises(JobError, match=r"last: 99, and the model has \d+ blocks"):
        finetune(TrainingConfig(**fields, last=99))
    (tmp_path / "loose").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "loose" / "a.png")
    with pytest.raises(
        JobError,
        match=r"label: cls: loose files have no columns\. Set label: folder, or give a label_table",
    ):
        finetune(TrainingConfig(**{**fields, "source": str(tmp_path / "loose"), "label": "cls"}))


def test_one_class_and_a_checkpoint_of_another_shape_are_refused(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    alone = digits.tar(tmp_path / "alone.tar", digits.few(30, [4]))
    with pytest.raises(JobError, match=r"have 1 class \(4\); a classifier needs two"):
        finetune(TrainingConfig(**{**small, "source": alone, "out": str(tmp_path / "a")}))
    shutil.copytree(trained, tmp_path / "wide")
    edit(str(tmp_path / "wide" / "config.json"), intermediate_size=80)
    with pytest.raises(ModelError, match=r"weights of another shape than its config.json says"):
        finetune(
            TrainingConfig(
                **{
                    **small,
                    "model": str(tmp_path / "wide"),
                    "train": "head",
                    "init": "weights",
                    "out": str(tmp_path / "b"),
                }
            )
        )


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"epohcs": 3}, JobError, "unknown field `epohcs`; did you mean `epochs`"),
        ({"source": None}, JobError, r"not valid: `source`: null is not a list; write \[a, b\]$"),
        (
            {"classes": [0, 1, 2]},
            JobError,
            "not valid: `classes.0`: 0 is not text; put it in quotes$",
        ),
        ({"classes": ["a", " a"]}, JobError, "`classes`: label a appears twice"),
        ({"dataset": "d"}, JobError, "source and dataset: give one of them"),
        ({"train": "probe", "init": "weights"}, JobError, "stored embeddings: give `dataset`"),
        ({"train": "head"}, JobError, "init: scratch needs train: full"),
        (
            {"batch_size": 10, "accumulate": 3},
            JobError,
            "batch_size 10 is not a multiple of 1 worker x 3 parts",
        ),
        ({"label": "txt"}, JobError, "200 images without a label .txt., such as"),
        (
            {"label": "json", "label_field": "digits"},
            JobError,
            "200 images without a label .json, field digits., such as",
        ),
        ({"classes": ["0", "1", "2"]}, JobError, "not among the 3 classes: 140 labels, such as"),
        (
            {"label_table": "nowhere.csv", "label": "x"},
            JobError,
            r"label_table nowhere.csv does not exist\. Correct `label_table`\.",
        ),
        ({"rank": 16}, JobError, "rank is for train: lora, and train is full"),
        ({"last": 2}, JobError, "last is for train: last, and train is full"),
        (
            {"distill": "embedding", "temperature": 3},
            JobError,
            "distill, temperature: give `teacher` or `teacher_model`, too",
        ),
        (
            {"weight_decay": float("inf")},
            JobError,
            "`weight_decay`: must be a finite number",
        ),
        (
            {"workers": 64, "batch_size": 640, "accumulate": 10},
            JobError,
            "images cannot be divided into 640 parts",
        ),
        ({"validation": 1e-9}, JobError, "no image fell into the held-out share"),
        ({"init": "weights"}, ModelError, "holds no model.safetensors"),
        ({"teacher": "nowhere"}, JobError, "holds no vitray dataset"),
        (
            {"teacher": "a", "teacher_model": "b"},
            JobError,
            "teacher and teacher_model: give one of them",
        ),
        ({"teacher_model": "/nowhere/model"}, ModelError, "/nowhere/model does not exist"),
        ({"lr": 1e30, "clip": 1e30, "warmup": 0.0}, vitray.VitrayError, "the loss is"),
    ],
)
def test_bad_input_is_one_line(
    fields: dict[str, object],
    error: type[Exception],
    says: str,
    small: dict[str, object],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says) as raised:
        finetune(TrainingConfig(**{**small, "out": str(tmp_path / "out"), **fields}))
    assert "\n" not in str(raised.value)
    assert (tmp_path / "out").exists() == (
        "lr" in fields
    )  # what is refused leaves nothing, no decoded image either
