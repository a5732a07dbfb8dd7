"""What learns, how fast, and when a training stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.training_runs import weights
from vitray.models import checkpoint_store
from vitray.training.activity import Activity, Phase
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.student import parameter_groups, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lower_blocks_learn_more_slowly(trained: str, small: dict[str, object]) -> None:
    config = TrainingConfig(
        **{**small, "model": trained, "init": "weights", "out": "x", "layer_decay": 0.5}
    )
    student = prepare(config, checkpoint_store.locate(trained, None), tuple("0123456789"), None)
    names = {id(p): name for name, p in student.named_parameters()}
    scales = {
        names[id(p)]: (g["scale"], g["weight_decay"])
        for g in parameter_groups(student, config)
        for p in g["params"]
    }
    assert scales["module.classifier.weight"] == (1.0, 0.05) and scales[
        "module.classifier.bias"
    ] == (1.0, 0.0)
    assert scales["module.vit.layers.1.attention.q_proj.weight"][0] == 0.5
    assert scales["module.vit.layers.0.attention.q_proj.weight"][0] == 0.25
    assert scales["module.vit.embeddings.cls_token"][0] == 0.125


def test_parts_of_a_step_add_up_to_it(small: dict[str, object], tmp_path: Path) -> None:
    found = []
    for parts in (1, 4):
        out = str(tmp_path / str(parts))
        finetune(TrainingConfig(**{**small, "out": out, "accumulate": parts, "epochs": 2}))
        found.append(weights(out))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-4)


def test_training_stops_when_it_gets_no_better(small: dict[str, object], tmp_path: Path) -> None:
    reported: list[dict[str, float]] = []
    fields = {
        **small,
        "out": str(tmp_path / "out"),
        "epochs": 30,
        "patience": 2,
        "lr": 1e-9,
        "metric": "accuracy",
    }
    result = finetune(
        TrainingConfig(**fields),
        report=lambda record: reported.append(record) if "epoch" in record else None,
    )
    assert result.epochs == len(reported) < 30
    best = max(
        reported, key=lambda record: (record["validation_accuracy"], -record["validation_loss"])
    )
    assert result.epochs == best["epoch"] + 2
    assert result.figures["validation_loss"] == pytest.approx(best["validation_loss"], rel=1e-6)


def test_precision_bf16_and_class_weights_train(small: dict[str, object], tmp_path: Path) -> None:
    fields = {
        **small,
        "out": str(tmp_path / "out"),
        "precision": "bf16",
        "class_weights": "balanced",
        "epochs": 8,
    }
    reported: list[dict[str, float]] = []
    seen: list[Activity] = []
    finetune(TrainingConfig(**fields), report=reported.append, watch=seen.append)
    assert list(dict.fromkeys(each.phase for each in seen)) == [
        Phase.READING_MODEL,
        Phase.READING_SOURCE,
        Phase.DECODING,
        Phase.OPENING_MODEL,
        Phase.TRAINING,
        Phase.MEASURING,
        Phase.WRITING,
    ]
    for phase in (Phase.DECODING, Phase.TRAINING, Phase.MEASURING):
        shares = [each.share for each in seen if each.phase is phase]
        assert None not in shares and shares == sorted(shares)
    training = [each for each in seen if each.phase is Phase.TRAINING]
    assert training[-1].share == 1
    steps = {each.detail for each in training if "step" in each.detail}
    # each step reports its blocks, forward and backward
    assert len(steps) == reported[-1]["step"] and len(training) > 5 * len(steps)
    assert (
        reported[-1]["loss"] < reported[0]["loss"]
        and weights(fields["out"])["classifier.weight"].dtype == torch.float32
    )
