"""What learns, how fast, and when a training stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from factories.small_models import PREFIX, make_checkpoint
from support.training_runs import weights
from vitray.models import checkpoint_store
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.student import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PREFIX)
def test_every_family_trains_every_way(name: str, small: dict[str, object], tmp_path: Path) -> None:
    found = checkpoint_store.locate(make_checkpoint(tmp_path / "model", name, headed=False), None)
    for train in ("head", "last", "lora", "full"):
        config = TrainingConfig(
            **{
                **small,
                "out": "x",
                "train": train,
                "init": "weights",
                "gradient_checkpointing": True,
            }
        )
        student = prepare(config, found, ("a", "b", "c"), 5)
        logits, own = student(torch.randn(2, 3, 32, 32))
        assert logits.shape == (2, 3) and own.shape == (2, 5)
        (logits.square().sum() + own.sum()).backward()
        assert student.learning() and all(p.grad is not None for p in student.learning().values())
        plain = student.eval()(pixels := torch.randn(1, 3, 32, 32))[0]
        torch.testing.assert_close(
            student.finished()(pixel_values=pixels).logits, plain, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("train", ["head", "last", "lora"])
def test_only_what_the_config_names_learns(
    train: str, trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    fields = {
        **small,
        "model": trained,
        "train": train,
        "init": "weights",
        "out": out,
        "epochs": 1,
        "classes": [str(n) for n in range(9, -1, -1)],
    }
    finetune(TrainingConfig(**fields))
    before, after = weights(trained), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    linear = {
        name
        for name in after
        if "layer." in name and name.endswith("weight") and "norm" not in name
    }
    expected = {
        "head": {"classifier.weight", "classifier.bias"},
        "last": {
            name
            for name in after
            if "layer.1." in name or "classifier" in name or name.startswith("vit.layernorm")
        },
        "lora": {"classifier.weight", "classifier.bias"} | linear,
    }[train]
    assert changed == expected
    assert json.loads(Path(out, "config.json").read_text())["id2label"]["0"] == "9"
