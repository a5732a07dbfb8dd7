"""A linear probe on stored embeddings: a checkpoint and a head."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray
from support.training_runs import embedded
from vitray.errors import ModelError
from vitray.model_export.export import export_model
from vitray.models import checkpoint_store
from vitray.models.exported import hash_model
from vitray.models.linear_head import read_head
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_export_is_no_model_to_train_but_its_embeddings_are_enough_for_a_probe(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    export = str(tmp_path / "export")
    export_model(vitray.Job(source=small["source"], model=trained, out="o"), "onnx", "", export)
    for field in ("model", "teacher_model"):
        with pytest.raises(
            ModelError,
            match=rf"{export} is an export \(onnx\), which cannot be trained\. Give "
            rf"{Path(trained).name}",
        ):
            finetune(TrainingConfig(**{**small, field: export, "out": str(tmp_path / "out")}))
    dataset = embedded(export, small["source"], tmp_path / "dataset", engine="auto")
    result = finetune(
        TrainingConfig(
            train="probe", dataset=dataset, label="cls", validation=0.2, out=str(tmp_path / "probe")
        )
    )
    assert not result.model and result.figures["validation_accuracy"] > 0.3
    assert read_head(str(tmp_path / "probe")).weights_sha256 == hash_model(
        checkpoint_store.locate(export, None)
    )
