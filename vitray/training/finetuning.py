"""`vitray finetune`: from a config to a checkpoint in OUT that `model:` takes. Safe to kill and to
repeat.

OUT/vision_config.json, model.safetensors, preprocessor_config.json   the checkpoint; a probe also has head.json, head.safetensors
OUT/README.md, metrics.jsonl, report.html, tensorboard/        what it is, how it went
OUT/_vitray/training.json                                      what decides the numbers; conditional create, first run wins
OUT/_vitray/state/                                             best and last checkpoints
OUT/_vitray/result.json                                        the end; there exactly when all of the above is
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitray.dataset import (
    INTERNAL_FOLDER,
    SCRATCH_PREFIX,
    Dataset,
    check_store,
    choose_vector,
    internal_url,
    matrix_of,
    require_complete,
)
from vitray.errors import FingerprintError, JobError, ModelError, ObjectMissing
from vitray.models import checkpoint
from vitray.models.exported import hash_model, read_graph
from vitray.models.pixels import read_pixels
from vitray.schema import short_hash
from vitray.storage import absolute, exists, join, read, store_for
from vitray.training import checkpoints, examples, outputs
from vitray.training.config import TrainingConfig

log = logging.getLogger(__name__)
Tell = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Result:
    """What was trained. figures: of the held-out images, by the weights that were chosen; skipped:
    images that were not used.
    """

    out: str
    train: str
    classes: int
    images: int
    held_out: int
    skipped: int
    epochs: int
    seconds: float
    figures: dict[str, float]
    model: bool  # whether OUT is a checkpoint that `model:` takes; else a head for `head:`

    def __str__(self) -> str:
        judged = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.figures.items()
        )
        what = (
            f"{self.train} on {self.images:,} images of {self.classes} classes in "
            f"{self.seconds:.1f} s"
        )
        lines = [f"{self.out}: {what}; {judged or 'not judged'}"]
        lines += (
            [f"skipped    {self.skipped:,} images, listed in {join(self.out, 'skipped.json')}"]
            if self.skipped
            else []
        )
        use = f"vitray relabel DATASET --head {self.out} --into …"
        use = f"vitray run SOURCE --model {self.out} --out …" if self.model else use
        return "\n".join(
            [*lines, f"use it     {use}", f"look       {join(self.out, 'report.html')}"]
        )


def finetune(
    config: TrainingConfig,
    tell: Tell = lambda record: None,
    address: str | None = None,
    allow_open: bool = False,
) -> Result:
    """Train what is missing and write OUT. tell: gets a record an epoch, and one every 30 s in
    between (fitting.Fitting.run).

    address, allow_open: of Ray, where there are several workers. Raises JobError for a config that
    does not fit its data or model, FingerprintError when OUT was begun with another config or other
    data or holds what no training wrote, StorageError.
    """
    with _alone(config.out):
        try:
            done = json.loads(read(_url(config, "result.json")))
        except ObjectMissing:
            _require_own(config)
            check_store(config.out)
        else:
            _require_same(config, {})
            _sweep(config)
            log.warning(
                "%s is trained already: nothing was done, and no image was looked at", config.out
            )
            return Result(**{**done, "out": absolute(config.out)})
        try:
            result = (
                _probe(config)
                if config.train == "probe"
                else _train(config, tell, address, allow_open)
            )
        except JobError:
            if not exists(_url(config, "training.json")):  # refused before anything was begun
                examples.forget(config.out)
            raise
        store_for(config.out).replace(
            _url(config, "result.json"), json.dumps({**vars(result), "out": ""}, indent=1).encode()
        )
        _sweep(config)
        return result


def _sweep(config: TrainingConfig) -> None:
    checkpoints.sweep(_url(config, "state"))
    examples.forget(config.out)


def _train(config: TrainingConfig, tell: Tell, address: str | None, allow_open: bool) -> Result:
    from vitray.models.machine import resolve_device
    from vitray.training.fitting import WorkerGroup, put

    training_run = TrainingRun.of(config)
    # of several workers' training this process makes the end alone, on what it has: a cluster's
    # head may be without a GPU
    device = (
        "" if config.workers == 1 else "cpu" if config.device == "cpu" else resolve_device("auto")
    )
    group = WorkerGroup(device=device, owner=uuid.uuid4().hex)
    fitting, training_data = training_run.fitting(group), training_run.training_data
    same = {
        "weights": training_run.weights,
        "data": training_data.digest,
        "class_names": list(training_data.classes),
    }
    same |= (
        {"teacher_weights": checkpoint.hash_weights(training_run.online_teacher)}
        if training_run.online_teacher
        else {}
    )
    _require_same(config, {**same, "images_a_step": fitting.batches.size})
    checkpoints.take(fitting.state, group.owner)
    if config.workers > 1:
        from vitray.training.workers import fit_with_ray

        fit_with_ray(config, group.owner, address, allow_open)
        checkpoints.require_own(fitting.state, group.owner)
    progress = fitting.run(tell)  # after workers: reads how they ended
    if config.workers > 1:
        for record in progress.records:
            if "epoch" in record:
                tell(record)
    if (best := checkpoints.load(fitting.state, "best")) is not None:
        put(fitting.learning, best[0], fitting.state)
    held = training_data.held_out
    judged = fitting.judge(held, training_run.pixels) if len(held.ids) else None
    figures = judged.figures(held.ids) if judged is not None else {}
    told = outputs.Told(
        config,
        training_run.found,
        training_data.classes,
        progress.records,
        training_data.skipped,
        figures,
    )
    seen = outputs.Seen(held.keys, held.ids, judged, held.pixels) if judged is not None else None
    checkpoints.require_own(fitting.state, group.owner)
    outputs.write(told, fitting.student.finished().cpu(), None, seen)
    counts = (
        len(training_data.classes),
        len(training_data.train.ids),
        len(held.ids),
        len(training_data.skipped),
    )
    epochs = int(progress.records[-1]["epoch"])
    return Result(
        absolute(config.out), config.train, *counts, epochs, progress.seconds, figures, True
    )


def _probe(config: TrainingConfig) -> Result:
    from vitray.models.head import Head
    from vitray.training.fitting import class_weights
    from vitray.training.linear_probe import fit_probe, judge_probe

    started = time.monotonic()
    dataset = require_complete(str(config.dataset))
    vector = choose_vector(dataset, config.column)
    rows, column, bad = examples.label_rows(config, vector.column)
    found = checkpoint.locate(
        config.model or dataset.spec.model,
        config.revision if config.model else dataset.spec.revision,
    )
    if (weights := hash_model(found)) != dataset.spec.weights_sha256:
        what = f"{found.model} is not the model of {dataset.out}: its weights are others"
        raise ModelError(f"{what}. Leave `model` out, or make a new dataset.")
    examples.require_labels(config, rows)
    pairs = [(key, label) for key, label in rows if label is not None]
    classes = examples.choose_classes(config, {label for _, label in pairs})
    ids = examples.class_ids(pairs, classes)
    vectors = matrix_of(column)[[n for n, row in enumerate(rows) if row[1] is not None]].astype(
        np.float32
    )
    held = np.array([examples.is_held_out(key, config.validation) for key, _ in pairs])
    examples.require_both(config, ids[~held], ids[held])
    _require_same(
        config,
        {
            "weights": weights,
            "data": dataset.fingerprint,
            "class_names": list(classes),
            "rows": len(ids),
        },
    )
    unseen = vectors[held], ids[held]
    loss_weights = class_weights(config, ids[~held], len(classes))
    fitted = fit_probe(
        vectors[~held], ids[~held], unseen, loss_weights, config.label_smoothing, config.metric
    )
    figures = {name: value for name, value in fitted.best.items() if name.startswith("validation")}
    head = Head(
        classes,
        fitted.weight,
        fitted.bias,
        vector.layer,
        vector.pool,
        vector.normalize,
        found.model,
        weights,
    )
    module = _with_head(config, found, head, dataset.spec.family)
    skipped = [
        {"key": key, "reason": examples.NO_LABEL, "message": "skipped"}
        for key, label in rows
        if label is None
    ]
    skipped += bad
    told = outputs.Told(config, found, classes, fitted.records, skipped, figures)
    judged = judge_probe(fitted.weight, fitted.bias, *unseen) if held.any() else None
    shown = [key for (key, _), there in zip(pairs, held) if there]
    outputs.write(
        told, module, head, outputs.Seen(shown, ids[held], judged, None) if judged else None
    )
    counts = len(classes), int((~held).sum()), int(held.sum()), len(skipped), 1
    return Result(
        absolute(config.out),
        "probe",
        *counts,
        time.monotonic() - started,
        figures,
        module is not None,
    )


@dataclass(frozen=True)
class TrainingRun:
    """All that a worker needs, made from the config alone, so that each worker makes its own."""

    config: TrainingConfig
    found: checkpoint.Checkpoint
    weights: str
    pixels: Any
    training_data: examples.TrainingData
    teacher: Dataset | None
    online_teacher: checkpoint.Checkpoint | None

    @classmethod
    def of(cls, config: TrainingConfig) -> TrainingRun:
        found = _checkpoint(str(config.model), config.revision)
        vision_config = checkpoint.read_config(found)
        scratch = config.init == "scratch"
        weights = (
            json.dumps(vision_config.hf.to_diff_dict(), sort_keys=True, default=str)
            if scratch
            else checkpoint.hash_weights(found)
        )
        pixels = read_pixels(found, vision_config)
        teacher = require_complete(config.teacher) if config.teacher else None
        online_teacher = _checkpoint(config.teacher_model, None) if config.teacher_model else None
        training_data = examples.gather(
            config,
            pixels,
            _taught(config, teacher, online_teacher),
            examples.work_folder(config.out),
        )
        return cls(config, found, weights, pixels, training_data, teacher, online_teacher)

    def fitting(self, group: Any = None) -> Any:
        """A fitting.Fitting for one worker of a fitting.WorkerGroup, or for one that is alone."""
        from vitray.training.batches import Batches
        from vitray.training.fitting import Fitting, WorkerGroup
        from vitray.training.student import prepare
        from vitray.training.teachers import OnlineTeacher, Teaching

        group = group or WorkerGroup()
        classes, train = self.training_data.classes, self.training_data.train
        teaching: Teaching | OnlineTeacher | None = None
        if self.teacher is not None:
            teaching = Teaching(self.config, self.teacher, train.hashes, classes)
        elif self.online_teacher is not None:
            teaching = OnlineTeacher(self.config, self.online_teacher, classes, self.pixels)
        dimension = (
            teaching.size if teaching is not None and self.config.distill == "embedding" else None
        )
        batches = Batches(self.config, train, self.pixels, len(classes), teaching, group.world)
        student = prepare(self.config, self.found, classes, dimension)
        return Fitting(
            self.config,
            student,
            batches,
            self.training_data.held_out,
            group,
            _url(self.config, "state"),
        )


def _checkpoint(model: str, revision: str | None) -> checkpoint.Checkpoint:
    """Raises ModelError for an export whose weights are in a graph."""
    found = checkpoint.locate(model, revision)
    if export := read_graph(found):
        raise ModelError(
            f"{model} is an export ({export.to}), which cannot be trained. Give {export.source}, "
            f"of which it was made."
        )
    return found


def _taught(
    config: TrainingConfig, teacher: Dataset | None, online_teacher: checkpoint.Checkpoint | None
) -> tuple[str, ...]:
    """The classes whose scores are learnt of a teacher. Raises JobError where it has none, or
    scores that are no distribution.
    """
    if config.distill == "embedding":
        return ()
    if online_teacher is not None:
        vision_config = checkpoint.read_config(online_teacher)
        name, labels, independent = (
            online_teacher.model,
            checkpoint.read_labels(online_teacher, vision_config),
            vision_config.multi_label,
        )
    elif teacher is not None:
        name, labels, independent = (
            teacher.out,
            teacher.spec.labels if teacher.job.labelled else (),
            teacher.spec.multi_label,
        )
    else:
        return ()
    if not labels:
        raise JobError(
            f"teacher {name} holds no labels. Set distill: embedding, or give one that labels."
        )
    if independent:
        raise JobError(
            f"teacher {name} has scores of independent classes, which are no distribution. Set "
            f"distill: embedding."
        )
    return labels


def _with_head(
    config: TrainingConfig, found: checkpoint.Checkpoint, head: Any, family: str
) -> Any | None:
    """The whole module where its own head reads what the probe does, CLS after the final LayerNorm;
    else, and of an export, None.
    """
    if (
        family not in ("vit", "deit")
        or (head.layer, head.pool, head.normalize) != (None, "cls", False)
        or read_graph(found)
    ):
        return None
    import torch

    from vitray.models.loading import load_trainable

    module = load_trainable(found, head.labels, config.seed, scratch=False).module
    with torch.no_grad():
        module.classifier.weight.copy_(torch.from_numpy(head.weight))
        module.classifier.bias.copy_(torch.from_numpy(head.bias))
    return module


def _require_own(config: TrainingConfig) -> None:
    """Raises FingerprintError when OUT holds anything but what a killed training leaves before it
    has begun, such as a model.
    """
    out = absolute(config.out)
    if exists(_url(config, "training.json")):
        return
    try:
        there = [info.url.removeprefix(f"{out}/") for info in store_for(out).find(out)]
    except ObjectMissing:
        return
    ours = (f"{INTERNAL_FOLDER}/images/", f"{INTERNAL_FOLDER}/{SCRATCH_PREFIX}")
    if not exists(_url(config, "training.json")) and (
        foreign := [name for name in there if not name.startswith(ours)]
    ):
        raise FingerprintError(
            f"{out} holds what no training wrote, such as {foreign[0]}. Choose an empty directory "
            f"as `out`."
        )


def _require_same(config: TrainingConfig, more: dict[str, object]) -> None:
    """Raises FingerprintError when OUT was begun with something else, and names it."""
    mine = json.loads(json.dumps({**config.deciding(), **more}))
    url = _url(config, "training.json")
    if store_for(url).create(url, json.dumps(mine, indent=1).encode()):
        return
    theirs = json.loads(read(url))
    if names := [name for name in mine if theirs.get(name) != mine[name]]:
        raise FingerprintError(
            f"{config.out} was begun with another {', '.join(names)}. Choose another `out`, or go "
            f"back to what it was."
        )


def _url(config: TrainingConfig, name: str) -> str:
    return internal_url(config.out, name)


@contextmanager
def _alone(out: str) -> Iterator[None]:
    """Two trainings of this machine into one OUT would delete each other's checkpoints. Raises
    JobError.
    """
    path = os.path.join(
        checkpoint.cache_directory("finetune"), f"{short_hash(absolute(out), 24)}.lock"
    )
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(
                f"another vitray finetune trains into {out}. Wait for it, or choose another `out`."
            ) from None
        yield
