"""A linear probe on stored embeddings: a checkpoint and a head."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import vitray
from factories.small_models import make_checkpoint
from support.training_runs import embedded
from vitray.errors import ModelError
from vitray.model_export.export import export_model
from vitray.models import checkpoint_store
from vitray.models.exported import hash_model
from vitray.models.linear_head import read_head
from vitray.training.config import TrainingConfig
from vitray.training.examples import is_held_out
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


def test_a_linear_probe_reads_no_image_and_is_a_checkpoint_and_a_head(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    source = tmp_path / "d.tar"
    shutil.copyfile(str(small["source"]), source)
    dataset = embedded(trained, str(source), tmp_path / "dataset")
    source.unlink()
    out = str(tmp_path / "out")
    result = finetune(
        TrainingConfig(dataset=dataset, train="probe", label="cls", validation=0.2, out=out)
    )
    assert result.model and result.images + result.held_out == 200
    head, rows = read_head(out), vitray.read(dataset)
    vectors = np.stack(rows["embedding"].to_numpy())
    said = [head.labels[n] for n in (vectors @ head.weight.T + head.bias).argmax(1)]
    held = [n for n, key in enumerate(rows["key"].to_pylist()) if is_held_out(key, 0.2)]
    truth = rows["cls"].to_pylist()
    assert np.mean([said[n] == truth[n] for n in held]) == pytest.approx(
        result.figures["validation_accuracy"]
    )
    again = embedded(out, small["source"], tmp_path / "again")
    assert vitray.read(again)["label"].to_pylist() == said
    with pytest.raises(ModelError, match="is not the model of"):
        other = make_checkpoint(tmp_path / "other", "vit", headed=True)
        finetune(
            TrainingConfig(
                dataset=dataset, model=other, train="probe", label="cls", out=str(tmp_path / "x")
            )
        )
