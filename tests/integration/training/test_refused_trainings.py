"""Configs, sources and directories that a training refuses, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray
from vitray.errors import JobError, ModelError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


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
            "batch_size 10 is not a multiple of 1 workers x 3 parts",
        ),
        ({"label": "txt"}, JobError, "200 images without a label .txt., such as"),
        (
            {"label": "json", "label_field": "digits"},
            JobError,
            "200 images without a label .json, field digits., such as",
        ),
        ({"classes": ["0", "1", "2"]}, JobError, "140 labels are not among the 3 classes, such as"),
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
            "`weight_decay`: Input should be a finite number",
        ),
        (
            {"workers": 64, "batch_size": 640, "accumulate": 10},
            JobError,
            "images are too few for 640 parts",
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
