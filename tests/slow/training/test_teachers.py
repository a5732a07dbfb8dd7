"""Training by a teacher's outputs, and by a model's own labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import vitray
from factories import digits
from support.training_runs import embedded, weights
from vitray.errors import JobError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.teachers import StoredTeacher
from vitray.training.training_run import TrainingRun


def test_a_teacher_is_joined_by_bytes_and_the_remainder_is_spread(
    trained: str, small: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = embedded(trained, small["source"], tmp_path / "dataset", top_k=3)
    fields = {
        **small,
        "source": [],
        "teacher": dataset,
        "out": str(tmp_path / "out"),
        "label": "cls",
        "epochs": 1,
    }
    training_run = TrainingRun.of(TrainingConfig(**fields))
    assert training_run.teacher is not None and training_run.training_data.classes == tuple(
        "0123456789"
    )
    teaching = StoredTeacher(
        training_run.config,
        training_run.teacher,
        training_run.training_data.train.hashes,
        training_run.training_data.classes,
    )
    dense = teaching.of(np.arange(len(training_run.training_data.train.ids)))
    rows = {row["content_hash"]: row for row in vitray.read(dataset).to_pylist()}
    for n in (0, 7, 50):
        row = rows[training_run.training_data.train.hashes[n]]
        np.testing.assert_allclose(dense[n, row["top_ids"]], row["top_scores"], rtol=1e-6)
        rest = np.delete(dense[n], row["top_ids"])
        np.testing.assert_allclose(rest, (1 - sum(row["top_scores"])) / 7, atol=1e-6)
    for distill, what in (("labels", "scores"), ("embedding", "embeddings")):
        result = finetune(
            TrainingConfig(**{**fields, "distill": distill, "out": str(tmp_path / distill)})
        )
        assert result.images + result.held_out == 200 and "projector" not in " ".join(
            weights(result.out)
        )
        card = Path(result.out, "README.md").read_text()
        assert f"It learnt the {what} of a teacher, with a weight of 0.5 beside the labels." in card
        assert "Its labels are another model's" not in card
    result = finetune(
        TrainingConfig(
            **{**{k: v for k, v in fields.items() if k != "label"}, "out": str(tmp_path / "own")}
        )
    )
    card = Path(result.out, "README.md").read_text()
    assert "Its labels are another model's: the figures are its agreement with that model." in card
    StoredTeacher(
        training_run.config,
        training_run.teacher,
        [*training_run.training_data.train.hashes[:3], b"unseen"],
        training_run.training_data.classes,
    )
    assert (
        f"teacher {dataset} does not have 1 of 4 images: only their labels are learnt"
        in caplog.text
    )
    other = digits.tar(tmp_path / "other.tar", digits.few(5, [0, 1], skip=60))
    with pytest.raises(JobError, match="has none of these images"):
        finetune(TrainingConfig(**{**fields, "source": other, "out": str(tmp_path / "y")}))


def test_pseudo_labels_are_the_models_own(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    dataset = embedded(trained, small["source"], tmp_path / "dataset")
    scores = vitray.read(dataset)["score"].to_numpy()
    least = float(np.median(scores))
    config = TrainingConfig(
        **{
            **small,
            "source": [],
            "label": "label",
            "dataset": dataset,
            "min_score": least,
            "out": str(tmp_path / "out"),
            "epochs": 1,
        }
    )
    result = finetune(config)
    assert result.images + result.held_out == int((scores >= np.float32(least)).sum())
