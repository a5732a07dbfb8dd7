"""`TrainingRun`: the data, checkpoints and teacher of a training, made from the config alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitray.dataset import Dataset, require_complete, training_url
from vitray.errors import JobError, ModelError
from vitray.models import checkpoint, checkpoint_store
from vitray.models.checkpoint import Checkpoint
from vitray.models.exported import read_graph
from vitray.models.pixels import read_pixels
from vitray.schema import PixelSpec
from vitray.training.activity import Activity, Phase, Watch, unwatched
from vitray.training.config import TrainingConfig
from vitray.training.examples import TrainingData, gather, work_folder

if TYPE_CHECKING:
    from vitray.training.fitting import Fitting, WorkerGroup
    from vitray.training.teachers import OnlineTeacher, StoredTeacher


@dataclass(frozen=True)
class TrainingRun:
    """All that a worker needs. Each worker makes its own, since the config alone decides it.

    base: the checkpoint to start from. weights: a hash of its weights; for random weights its
    configuration as JSON.
    """

    config: TrainingConfig
    base: Checkpoint
    weights: str
    pixels: PixelSpec
    training_data: TrainingData
    teacher: Dataset | None
    online_teacher: Checkpoint | None

    @classmethod
    def of(cls, config: TrainingConfig, watch: Watch = unwatched) -> TrainingRun:
        """Raises JobError, ModelError and StorageError for what the config cannot be trained on."""
        watch(Activity(Phase.READING_MODEL))
        base = _trainable(str(config.model), config.revision)
        vision_config = checkpoint.read_config(base)
        if config.init == "scratch":
            weights = json.dumps(vision_config.hf.to_diff_dict(), sort_keys=True, default=str)
        else:
            weights = checkpoint.hash_weights(base)
        pixels = read_pixels(base, vision_config)
        teacher = require_complete(config.teacher) if config.teacher else None
        online_teacher = _trainable(config.teacher_model, None) if config.teacher_model else None
        classes = _teacher_classes(config, teacher, online_teacher)
        training_data = gather(config, pixels, classes, work_folder(config.out), watch)
        return cls(config, base, weights, pixels, training_data, teacher, online_teacher)

    def fitting(self, group: WorkerGroup | None = None) -> Fitting:
        """The training loop of one worker of the group; without a group it is alone."""
        from vitray.training.batches import Batches
        from vitray.training.fitting import Fitting, WorkerGroup
        from vitray.training.student import prepare

        group = group or WorkerGroup()
        classes, train = self.training_data.classes, self.training_data.train
        teacher = self._open_teacher()
        learns_vectors = teacher is not None and self.config.distill == "embedding"
        dimension = teacher.size if teacher is not None and learns_vectors else None
        return Fitting(
            config=self.config,
            student=prepare(self.config, self.base, classes, dimension),
            batches=Batches(self.config, train, self.pixels, len(classes), teacher, group.world),
            held_out=self.training_data.held_out,
            group=group,
            state=state_folder(self.config.out),
        )

    def _open_teacher(self) -> StoredTeacher | OnlineTeacher | None:
        from vitray.training.teachers import OnlineTeacher, StoredTeacher

        classes, train = self.training_data.classes, self.training_data.train
        if self.teacher is not None:
            return StoredTeacher(self.config, self.teacher, train.hashes, classes)
        if self.online_teacher is not None:
            return OnlineTeacher(self.config, self.online_teacher, classes, self.pixels)
        return None


def state_folder(out: str) -> str:
    """The URL of the folder of a training's checkpoints."""
    return training_url(out, "state")


def _trainable(model: str, revision: str | None) -> Checkpoint:
    """Raises ModelError for an export whose weights are in a graph."""
    base = checkpoint_store.locate(model, revision)
    if export := read_graph(base):
        raise ModelError(
            f"{model} is an export ({export.to}), which cannot be trained. "
            f"Give {export.source}, the checkpoint that it was made of."
        )
    return base


def _teacher_classes(
    config: TrainingConfig, teacher: Dataset | None, online_teacher: Checkpoint | None
) -> tuple[str, ...]:
    """The classes whose scores are learnt; none without a teacher, or if its vectors are learnt.

    Raises JobError for a teacher without labels, and for scores that do not add up to 1.
    """
    if config.distill == "embedding":
        return ()
    if online_teacher is not None:
        vision_config = checkpoint.read_config(online_teacher)
        labels = checkpoint.read_labels(online_teacher, vision_config)
        return _distribution(online_teacher.model, labels, vision_config.multi_label)
    if teacher is not None:
        labels = teacher.spec.labels if teacher.job.labelled else ()
        return _distribution(teacher.out, labels, teacher.spec.multi_label)
    return ()


def _distribution(name: str, labels: tuple[str, ...], is_multi_label: bool) -> tuple[str, ...]:
    """The labels. Raises JobError unless the scores of all of them add up to 1."""
    if not labels:
        raise JobError(
            f"teacher {name} holds no labels. "
            "Set distill: embedding, or give a teacher with labels."
        )
    if is_multi_label:
        raise JobError(
            f"teacher {name} has scores of independent classes, which do not add up to 1. "
            "Set distill: embedding."
        )
    return labels
