"""Training by a teacher's outputs, and by a model's own labels."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factories.small_models import edit, make_checkpoint
from support.training_runs import PIXELS, equal, weights
from vitray.errors import FingerprintError, JobError
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.teachers import OnlineTeacher, normalised
from vitray.training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_teacher_model_sees_what_the_student_sees(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    """Crops and mixtures are its own, and so is its processor; its classes are found by name."""
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    teacher = tmp_path / "teacher"
    shutil.copytree(trained, teacher)
    (teacher / "processor_config.json").unlink(missing_ok=True)
    ViTImageProcessorPil(
        size={"height": 16, "width": 16},
        resample=2,
        image_mean=[0.2, 0.3, 0.4],
        image_std=[0.5, 0.7, 1],
    ).save_pretrained(teacher)
    classes = [str(n) for n in range(9, -1, -1)]
    fields = {
        **small,
        "teacher_model": str(teacher),
        "out": str(tmp_path / "out"),
        "mixup": 0.4,
        "classes": classes,
        "epochs": 1,
    }
    fitting = TrainingRun.of(TrainingConfig(**fields, teacher_weight=1.0)).fitting()
    batch, online_teacher = fitting.batches.batch(0, 0), fitting.batches.teacher
    assert isinstance(online_teacher, OnlineTeacher) and bool(batch.has_teacher.all())
    raw = (batch.pixels * 0.5 + 0.5) * 255
    own = normalised(raw, replace(PIXELS, mean=(0.2, 0.3, 0.4), std=(0.5, 0.7, 1.0)))
    model = AutoModelForImageClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        logits = model(pixel_values=own).logits.flip(1)
        torch.testing.assert_close(
            online_teacher(batch.pixels), logits.softmax(-1), rtol=1e-4, atol=1e-5
        )
        own_logits = fitting.student.train()(batch.pixels)[0]
        soft = (logits / 2).softmax(-1)
        expected = 4 * (soft * (soft.log() - (own_logits / 2).log_softmax(-1))).sum()
        torch.testing.assert_close(
            fitting.loss(fitting.student, batch, slice(None)), expected, rtol=1e-4, atol=1e-4
        )
    assert not any(
        p.requires_grad and p.grad is not None for p in online_teacher.network.module.parameters()
    )
    before = weights(str(teacher))
    for distill in ("labels", "embedding"):
        result = finetune(
            TrainingConfig(**{**fields, "distill": distill, "out": str(tmp_path / distill)})
        )
        assert (
            "projector" not in " ".join(weights(result.out))
            and str(tmp_path) not in Path(result.out, "README.md").read_text()
        )
    assert equal(before, weights(str(teacher)))
    # other weights under the same name are another teacher
    shutil.copyfile(tmp_path / "labels" / "model.safetensors", teacher / "model.safetensors")
    (tmp_path / "labels" / "_vitray" / "result.json").unlink()
    with pytest.raises(FingerprintError, match="begun with another teacher_weights"):
        finetune(TrainingConfig(**{**fields, "distill": "labels", "out": str(tmp_path / "labels")}))
    bare = make_checkpoint(tmp_path / "bare", "vit", headed=False)
    with pytest.raises(JobError, match=r"bare holds no labels\. Set distill: embedding"):
        finetune(TrainingConfig(**{**fields, "teacher_model": bare}))
    edit(str(teacher / "config.json"), problem_type="multi_label_classification")
    with pytest.raises(JobError, match="scores of independent classes, which do not add up to 1"):
        finetune(TrainingConfig(**fields))
