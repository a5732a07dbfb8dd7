"""A training that is killed, taken over or out of space goes on, or ends with one error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.training_runs import equal, weights
from vitray.errors import ClusterError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_session_trains_on_several_workers_again_and_again(
    ray: None, small: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {name: os.path.relpath(str(small[name])) for name in ("source", "model")}
    for name in ("one", "two"):
        result = finetune(
            TrainingConfig(**{**small, **places, "workers": 2, "epochs": 2, "out": name})
        )
        assert result.epochs == 2 and sorted(os.listdir(f"{name}/_vitray")) == [
            "result.json",
            "state",
            "training.json",
        ]
    assert equal(weights("one"), weights("two"))
    with pytest.raises(
        ClusterError, match=r"8 workers need a CPU each, and the cluster has \d\. Set fewer"
    ):
        finetune(TrainingConfig(**{**small, "workers": 8, "out": "three"}))
