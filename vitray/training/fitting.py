"""The training loop: in one process, or in the workers of Ray Train that share each step.

It continues from the last checkpoint. A step depends on the weights, AdamW's moments and the number
of the step alone: the batches follow from the seed, the learning rate from the step. So a killed
training ends with the same weights as an undisturbed one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vitray.crash import crash_point
from vitray.errors import Diverged, StorageError
from vitray.models import machine
from vitray.schema import PixelSpec
from vitray.training import checkpoints
from vitray.training.activity import Phase, Watch, unwatched
from vitray.training.batches import Batch, Batches
from vitray.training.config import TrainingConfig
from vitray.training.examples import Examples
from vitray.training.outcome import Evaluation, merit
from vitray.training.student import (
    Student,
    label_loss,
    parameter_groups,
    rate_at,
    score_loss,
    vector_loss,
)
from vitray.training.teachers import OnlineTeacher, normalised
from vitray.training.work_meter import WorkMeter

log = logging.getLogger(__name__)

EVALUATION_BATCH = 256  # images: in float32 a few hundred megabytes of a ViT-B
RECORDED_STEPS = 1000  # losses in the metrics; a longer training records every 2nd, 3rd …
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """This worker, among those that share a step.

    device: as Ray Train assigns it; empty for the config's. owner: see checkpoints.take_over.
    """

    rank: int = 0
    world: int = 1
    device: str = ""
    owner: str = ""

    def wrap(self, student: Student) -> Any:
        """The module to call instead of the student: its gradients are the mean of the group."""
        if self.world == 1:
            return student
        from ray.train.torch import prepare_model

        return prepare_model(student, move_to_device=False)

    def total(self, values: Any) -> Any:
        """The sum over the group, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def unsynced(self, wrapped: Any) -> AbstractContextManager[Any]:
        """Gradients stay on this worker while it is open."""
        return wrapped.no_sync() if self.world > 1 else nullcontext()


@dataclass
class TrainingProgress:
    """The state of a training besides its tensors, as checkpoints store it.

    records: {"step", "loss", "lr"} and {"epoch", "validation_loss", ...}.
    """

    step: int = 0
    records: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    done: bool = False
    seconds: float = 0.0


class Fitting:
    """One training, on one worker of a group."""

    def __init__(
        self,
        config: TrainingConfig,
        student: Student,
        batches: Batches,
        held_out: Examples,
        group: WorkerGroup,
        state: str,
    ) -> None:
        """state: the folder of its checkpoints."""
        self.config = config
        self.batches = batches
        self.held_out = held_out
        self.group = group
        self.state = state
        self.device = group.device or machine.resolve_device(config.device)
        self.kind = torch.device(self.device).type
        self.precision = precision_of(config, self.kind)
        self.student = student.to(self.device)
        self.learning = student.learning()
        self.optimizer = torch.optim.AdamW(parameter_groups(student, config), lr=config.rate)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.precision == "fp16")
        self.weights = class_weights(config, batches.examples.ids, batches.classes).to(self.device)
        self.progress = TrainingProgress()
        self.steps = config.epochs * batches.steps
        learning = {id(parameter) for parameter in self.learning.values()}
        self.meter = WorkMeter(student.blocks, learning)

    def run(
        self, report: Callable[[dict[str, float]], None], watch: Watch = unwatched
    ) -> TrainingProgress:
        """Train to the end, from the last checkpoint if there is one.

        report: gets the record of each epoch. watch: gets what is done within a step and an epoch.
        Raises Diverged.
        """
        self.restore()
        self.meter.watch = watch
        self._start_meter()
        wrapped = self.group.wrap(self.student)
        every = max(1, self.steps // RECORDED_STEPS)
        progress = self.progress
        while not progress.done:
            started = time.monotonic()
            epoch, step_in_epoch = divmod(progress.step, self.batches.steps)
            self.meter.begin(
                self.batches.size,
                self.meter.step_units * self.config.accumulate,
                f"epoch {epoch + 1} of {self.config.epochs}, step {progress.step + 1} of "
                f"{self.steps}",
            )
            rate, loss = self._step(wrapped, epoch, step_in_epoch)
            self.meter.end()
            progress.step += 1
            progress.seconds += time.monotonic() - started
            if (progress.step - 1) % every == 0:
                progress.records.append({"step": progress.step, "loss": loss, "lr": rate})
            if step_in_epoch + 1 == self.batches.steps:
                record = self._end_epoch(epoch + 1, loss)
                self.save()
                report(record)
            elif self.config.save_steps and progress.step % self.config.save_steps == 0:
                self.save()
            crash_point("train-step", str(progress.step))
        return progress

    def _start_meter(self) -> None:
        """Show what is done already. An epoch is all of its steps, and the held-out images."""
        held_out = len(self.held_out.ids)
        an_epoch = self.batches.steps * self.batches.size + held_out
        epochs, steps = divmod(self.progress.step, self.batches.steps)
        done = epochs * an_epoch + steps * self.batches.size
        self.meter.start(Phase.TRAINING, done, self.config.epochs * an_epoch)

    def _step(self, wrapped: Any, epoch: int, step_in_epoch: int) -> tuple[float, float]:
        """One step of the optimizer: its learning rate, and the mean loss of its images."""
        batch = self.batches.batch(epoch, step_in_epoch, self.group.rank)
        # so that dropout, if the checkpoint has any, follows from the step
        seed = (self.config.seed * 1_000_003 + self.progress.step) * 1009 + self.group.rank
        torch.manual_seed(seed)
        rate = rate_at(self.progress.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.student.train()
        loss = self._accumulated(wrapped, batch)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.learning.values(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        mean = float(self.group.total(loss))
        if not np.isfinite(mean):
            raise Diverged(
                f"the loss is {mean} in step {self.progress.step + 1}. "
                "Set a smaller `lr`, or precision: bf16 or fp32, and another `out`."
            )
        return rate, mean

    def _accumulated(self, wrapped: Any, batch: Batch) -> Any:
        """This worker's share of the step's mean loss; adds up the gradients of all parts."""
        parts = self.config.accumulate
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            is_last = part + 1 == parts
            with nullcontext() if is_last else self.group.unsynced(wrapped):
                images = slice(part, None, parts)
                loss = self.loss(wrapped, batch, images) / self.batches.size
                # DDP takes the mean of the workers' gradients, and the step needs their sum
                self.scaler.scale(loss * self.group.world).backward()
                total += loss.detach()
        return total

    def loss(self, wrapped: Any, batch: Batch, part: slice) -> Any:
        """The sum of the losses of these images: of their labels, and of their teacher."""
        pixels = batch.pixels[part].to(self.device)
        target = batch.target[part].to(self.device)
        teacher_target = batch.teacher_target[part].to(self.device)
        has_teacher = batch.has_teacher[part].to(self.device)
        with self._autocast():
            logits, own = wrapped(pixels)
            if isinstance(self.batches.teacher, OnlineTeacher):
                teacher_target = self.batches.teacher(pixels)
        hard = label_loss(logits, target, self.weights)
        if self.batches.teacher is None:
            return hard.sum()
        if own is None:
            soft = score_loss(logits, teacher_target, self.config.temperature)
        else:
            soft = vector_loss(own, teacher_target)
        share = self.config.teacher_weight * has_teacher
        return ((1 - share) * hard + share * soft).sum()

    def _autocast(self) -> Any:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if kind is None else torch.autocast(self.kind, kind)

    def _end_epoch(self, epoch: int, loss: float) -> dict[str, float]:
        """The epoch's record. Saves the best weights, and sets `done` after the last epoch."""
        progress = self.progress
        record: dict[str, float] = {"epoch": epoch, "loss": loss, "step": progress.step}
        if len(self.held_out.ids) > 0:
            evaluation = self.evaluate(self.held_out, self.batches.pixels)
            record |= evaluation.figures(self.held_out.ids)
            metric = self.config.metric
            if progress.best is None or merit(record, metric) > merit(progress.best, metric):
                progress.best = record
                self._save_best(record)
        progress.records.append(record)
        patience = self.config.patience or self.config.epochs
        is_stale = progress.best is not None and epoch - progress.best["epoch"] >= patience
        progress.done = epoch == self.config.epochs or is_stale
        return record

    def evaluate(self, examples: Examples, spec: PixelSpec) -> Evaluation:
        """The network's labels and losses for images; each worker computes its share."""
        self.student.eval()
        count = len(examples.ids)
        columns = torch.zeros(count, 3, dtype=torch.float64)  # id, score and loss of each image
        own = np.arange(self.group.rank, count, self.group.world)
        for start in range(0, len(own), EVALUATION_BATCH):
            images = own[start : start + EVALUATION_BATCH]
            self.meter.begin(len(images), self.meter.forward_units, "measuring the held-out images")
            columns[images] = self._evaluated(examples, images, spec)
            self.meter.end()
        if self.group.world > 1:
            columns = columns.to(self.device)
        ids, scores, losses = self.group.total(columns).cpu().numpy().T
        return Evaluation(
            ids.astype(np.int64), scores.astype(np.float32), losses.astype(np.float32)
        )

    def _evaluated(self, examples: Examples, images: np.ndarray, spec: PixelSpec) -> Any:
        """float64 [n, 3] on the CPU: id, score and loss of these images."""
        raw = torch.from_numpy(examples.pixels[images]).permute(0, 3, 1, 2).float()
        pixels = normalised(raw, spec)
        with torch.no_grad(), self._autocast():
            logits, _ = self.student(pixels.to(self.device))
        classes = self.batches.classes
        truth = torch.nn.functional.one_hot(torch.from_numpy(examples.ids[images]), classes)
        equal_weights = torch.ones(classes, device=self.device)
        losses = label_loss(logits, truth.to(self.device), equal_weights)
        scores, ids = logits.float().softmax(-1).max(-1)
        return torch.stack([ids.double(), scores.double(), losses.double()], 1).cpu()

    def _save_best(self, record: dict[str, float]) -> None:
        if self.group.rank == 0:
            checkpoints.require_owner(self.state, self.group.owner)
            checkpoints.save(self.state, "best", dict(self.learning), record)

    def save(self) -> None:
        """Write the checkpoint that `restore` reads. Only the first worker writes."""
        if self.group.rank > 0:
            return
        checkpoints.require_owner(self.state, self.group.owner)
        tensors = {f"weight.{name}": parameter for name, parameter in self.learning.items()}
        for kind in MOMENTS:
            for name, parameter in self.learning.items():
                moments = self.optimizer.state[parameter]
                if moments:  # none before the first update: fp16 skips steps that overflow
                    tensors[f"{kind}.{name}"] = moments[kind]
        # fewer than steps if fp16 overflowed
        first = next(iter(self.learning.values()))
        updates = int(self.optimizer.state[first].get("step", 0))
        numbers = {
            name: getattr(self.progress, name) for name in TrainingProgress.__dataclass_fields__
        }
        numbers |= {"scaler": self.scaler.state_dict(), "updates": updates}
        checkpoints.save(self.state, "last", tensors, numbers)
        crash_point("train-saved", str(self.progress.step))

    def restore(self) -> None:
        """Continue from the last checkpoint, if there is one. Raises StorageError."""
        saved = checkpoints.load(self.state, "last")
        if saved is None:
            return
        tensors, numbers = saved
        weights = {name: tensors.get(f"weight.{name}") for name in self.learning}
        copy_into(self.learning, weights, self.state)
        scaler = numbers.pop("scaler")
        if scaler:  # empty if the checkpoint was made in another precision
            self.scaler.load_state_dict(scaler)
        updates = float(numbers.pop("updates"))
        self.progress = TrainingProgress(**numbers)
        if not self.progress.done and self.group.rank == 0:
            log.warning("resuming from step %d of %d", self.progress.step, self.steps)
        if updates == 0:
            return
        for name, parameter in self.learning.items():
            moments = {kind: tensors[f"{kind}.{name}"].to(self.device) for kind in MOMENTS}
            self.optimizer.state[parameter] = {"step": torch.tensor(updates), **moments}


def copy_into(learning: dict[str, Any], tensors: dict[str, Any], state: str) -> None:
    """Copy saved values into the parameters of those names.

    Raises StorageError if they are of another network. state: their folder, for its message.
    """
    for name, parameter in learning.items():
        if tensors.get(name) is None or tensors[name].shape != parameter.shape:
            raise StorageError(
                f"{state} is of another training: {name} does not fit. "
                "Delete it to train from the start."
            )
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(tensors[name])


def precision_of(config: TrainingConfig, device: str) -> str:
    """fp32 on a CPU, where autocast makes training little faster and less exact."""
    if config.precision != "auto":
        return config.precision
    return machine.auto_precision(device) if device == "cuda" else "fp32"


def class_weights(config: TrainingConfig, ids: np.ndarray, classes: int) -> Any:
    """float32 [C]; their mean over the images is 1."""
    if config.class_weights == "none":
        return torch.ones(classes)
    counts = np.bincount(ids, minlength=classes)
    weights = len(ids) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32)
