"""The training loop: one process, or the workers of Ray Train that share each step. Goes on from
the last checkpoint.

After each step all that the next one depends on is (weights, AdamW's moments, step): batches follow
from the seed, the learning rate from the step. So a run that was killed ends with the weights of
one that was not.
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
from vitray.errors import StorageError, VitrayError
from vitray.models import machine
from vitray.schema import PixelSpec
from vitray.training import checkpoints
from vitray.training.batches import Batch, Batches
from vitray.training.config import TrainingConfig
from vitray.training.examples import SAID_S, Examples
from vitray.training.student import Student, cost, distance, divergence, groups, rate_at
from vitray.training.teachers import OnlineTeacher, normalised

log = logging.getLogger(__name__)

JUDGED_AT_ONCE = 256  # images, in float32 a few hundred megabytes of a ViT-B
TOLD_STEPS = 1000  # losses that the metrics keep; of longer trainings every 2nd, 3rd …


class Diverged(VitrayError):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True)
class WorkerGroup:
    """This worker among those that share a step. Alone: rank 0 of 1."""

    rank: int = 0
    world: int = 1
    device: str = ""  # as Ray Train shares them out
    owner: str = ""  # of the checkpoints: see checkpoints.take

    def wrap(self, student: Student) -> Any:
        """What is called instead of the student, so that gradients are the mean over the group."""
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
        return wrapped.no_sync() if self.world > 1 else nullcontext()


@dataclass
class Progress:
    """Where a training stands; all of it is in a checkpoint. records: {"step", "loss", "lr"} and
    {"epoch", "validation_loss", ...}.
    """

    step: int = 0
    records: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] | None = None
    done: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Judged:
    """What a network says of images. ids: int64 [N], scores, losses: float32 [N]."""

    ids: np.ndarray
    scores: np.ndarray
    losses: np.ndarray

    def figures(self, truth: np.ndarray) -> dict[str, float]:
        return {
            "validation_loss": float(self.losses.mean()),
            "validation_accuracy": float((self.ids == truth).mean()),
        }


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
        self.config, self.batches, self.held_out, self.group, self.state = (
            config,
            batches,
            held_out,
            group,
            state,
        )
        self.device = group.device or machine.resolve_device(config.device)
        self.kind = torch.device(self.device).type
        self.precision = precision_of(config, self.kind)
        self.student = student.to(self.device)
        self.learning = student.learning()
        self.optimizer = torch.optim.AdamW(groups(student, config), lr=config.rate)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.precision == "fp16")
        self.weights = class_weights(config, batches.examples.ids, batches.classes).to(self.device)
        self.progress = Progress()
        self.steps = config.epochs * batches.steps

    def run(self, tell: Callable[[dict[str, float]], None]) -> Progress:
        """Train to the end, from the last checkpoint if there is one.

        tell: gets a record at the end of each epoch, and every SAID_S {"step", "steps", "loss"} of
        a worker that is alone.
        """
        self._restore()
        said = time.monotonic()
        wrapped, every = self.group.wrap(self.student), max(1, self.steps // TOLD_STEPS)
        while not self.progress.done:
            started = time.monotonic()
            epoch, at = divmod(self.progress.step, self.batches.steps)
            rate, loss = self._step(wrapped, epoch, at)
            self.progress.step += 1
            self.progress.seconds += time.monotonic() - started
            if (self.progress.step - 1) % every == 0:
                self.progress.records.append({"step": self.progress.step, "loss": loss, "lr": rate})
            if at + 1 == self.batches.steps:
                record = self._judge(epoch + 1, loss)
                self._save()
                tell(record)
                said = time.monotonic()
            elif self.config.save_steps and self.progress.step % self.config.save_steps == 0:
                self._save()
            if self.group.world == 1 and time.monotonic() - said > SAID_S:
                said = time.monotonic()
                tell({"step": self.progress.step, "steps": self.steps, "loss": loss})
            crash_point("train-step", str(self.progress.step))
        return self.progress

    def _step(self, wrapped: Any, epoch: int, at: int) -> tuple[float, float]:
        """One step of the optimizer; returns the learning rate and the mean loss of the step's
        images.
        """
        batch, parts = self.batches.batch(epoch, at, self.group.rank), self.config.accumulate
        # dropout, where a checkpoint has any, follows from the step, too
        torch.manual_seed(
            (self.config.seed * 1_000_003 + self.progress.step) * 1009 + self.group.rank
        )
        rate = rate_at(self.progress.step, self.steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.student.train()
        total = torch.zeros((), device=self.device)
        for part in range(parts):
            with self.group.unsynced(wrapped) if part + 1 < parts else nullcontext():
                loss = self._loss(wrapped, batch, slice(part, None, parts)) / self.batches.size
                # the group's gradient is a mean over its workers, and must be the sum
                self.scaler.scale(loss * self.group.world).backward()
                total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.learning.values(), self.config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        mean = float(self.group.total(total))
        if not np.isfinite(mean):
            raise Diverged(
                f"the loss is {mean} in step {self.progress.step + 1}. Set a smaller `lr`, or "
                f"precision: bf16 or fp32, and another `out`."
            )
        return rate, mean

    def _loss(self, wrapped: Any, batch: Batch, part: slice) -> Any:
        """The sum over these images."""
        pixels, target, taught, known = (
            values[part].to(self.device)
            for values in (batch.pixels, batch.target, batch.taught, batch.known)
        )
        with self._autocast():
            logits, own = wrapped(pixels)
            if isinstance(self.batches.teaching, OnlineTeacher):
                taught = self.batches.teaching(pixels)
        hard = cost(logits, target, self.weights)
        if self.batches.teaching is None:
            return hard.sum()
        soft = (
            divergence(logits, taught, self.config.temperature)
            if own is None
            else distance(own, taught)
        )
        share = self.config.teacher_weight * known
        return ((1 - share) * hard + share * soft).sum()

    def _autocast(self) -> Any:
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return nullcontext() if kind is None else torch.autocast(self.kind, kind)

    def _judge(self, epoch: int, loss: float) -> dict[str, float]:
        """The epoch's record; keeps the weights where they are the best so far, and says when it is
        enough.
        """
        progress, config = self.progress, self.config
        record: dict[str, float] = {"epoch": epoch, "loss": loss, "step": progress.step}
        if len(self.held_out.ids):
            record |= self.judge(self.held_out, self.batches.spec).figures(self.held_out.ids)
            if progress.best is None or merit(record, config.metric) > merit(
                progress.best, config.metric
            ):
                progress.best = record
                if self.group.rank == 0:
                    checkpoints.require_own(self.state, self.group.owner)
                    checkpoints.save(self.state, "best", dict(self.learning), record)
        progress.records.append(record)
        stale = progress.best is not None and epoch - progress.best["epoch"] >= (
            config.patience or config.epochs
        )
        progress.done = epoch == config.epochs or stale
        return record

    def judge(self, examples: Examples, spec: PixelSpec) -> Judged:
        """What the network says of images, each worker of its share."""
        self.student.eval()
        count = len(examples.ids)
        found = torch.zeros(count, 3, dtype=torch.float64)
        mine = np.arange(self.group.rank, count, self.group.world)
        plain = torch.ones(self.batches.classes, device=self.device)
        for start in range(0, len(mine), JUDGED_AT_ONCE):
            places = mine[start : start + JUDGED_AT_ONCE]
            pixels = normalised(
                torch.from_numpy(examples.pixels[places]).permute(0, 3, 1, 2).float(), spec
            )
            with torch.no_grad(), self._autocast():
                logits, _ = self.student(pixels.to(self.device))
            truth = torch.nn.functional.one_hot(
                torch.from_numpy(examples.ids[places]), self.batches.classes
            ).to(self.device)
            scores, ids = logits.float().softmax(-1).max(-1)
            found[places] = torch.stack(
                [ids.double(), scores.double(), cost(logits, truth, plain).double()], 1
            ).cpu()
        found = (
            self.group.total(found.to(self.device) if self.group.world > 1 else found).cpu().numpy()
        )
        return Judged(
            found[:, 0].astype(np.int64),
            found[:, 1].astype(np.float32),
            found[:, 2].astype(np.float32),
        )

    def _save(self) -> None:
        if self.group.rank:
            return
        checkpoints.require_own(self.state, self.group.owner)
        moments = {
            f"{kind}.{name}": self.optimizer.state[p][kind]
            for kind in ("exp_avg", "exp_avg_sq")
            for name, p in self.learning.items()
            if self.optimizer.state[
                p
            ]  # none before the first update: fp16 skips those that overflow
        }
        numbers = {name: getattr(self.progress, name) for name in Progress.__dataclass_fields__}
        # fewer than steps where fp16 overflowed
        counts = [int(self.optimizer.state[p].get("step", 0)) for p in self.learning.values()]
        numbers |= {"scaler": self.scaler.state_dict(), "updates": counts[0]}
        checkpoints.save(
            self.state,
            "last",
            {f"weight.{name}": p for name, p in self.learning.items()} | moments,
            numbers,
        )
        crash_point("train-saved", str(self.progress.step))

    def _restore(self) -> None:
        found = checkpoints.load(self.state, "last")
        if found is None:
            return
        tensors, numbers = found
        put(
            self.learning,
            {name: tensors.get(f"weight.{name}") for name in self.learning},
            self.state,
        )
        if scaler := numbers.pop("scaler"):  # empty where it was begun in another precision
            self.scaler.load_state_dict(scaler)
        updates = torch.tensor(float(numbers.pop("updates")))
        self.progress = Progress(**numbers)
        if not self.progress.done and self.group.rank == 0:
            log.warning("going on from step %d of %d", self.progress.step, self.steps)
        for name, parameter in self.learning.items() if int(updates) else ():
            moments = {
                kind: tensors[f"{kind}.{name}"].to(self.device)
                for kind in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[parameter] = {"step": updates.clone(), **moments}


def put(learning: dict[str, Any], tensors: dict[str, Any], state: str) -> None:
    """Saved values into the parameters of those names. Raises StorageError where they are of
    another network.
    """
    odd = [
        name
        for name, p in learning.items()
        if tensors.get(name) is None or tensors[name].shape != p.shape
    ]
    if odd:
        raise StorageError(
            f"{state} is of another training: {odd[0]} does not fit. Delete it to train from the "
            f"start."
        )
    with torch.no_grad():
        for name, parameter in learning.items():
            parameter.copy_(tensors[name])


def merit(record: dict[str, float], metric: str) -> tuple[float, ...]:
    """Larger is better; of equal accuracies the smaller loss."""
    loss = -record["validation_loss"]
    return (record["validation_accuracy"], loss) if metric == "accuracy" else (loss,)


def precision_of(config: TrainingConfig, device: str) -> str:
    """fp32 on a CPU, where autocast wins little in training and costs digits."""
    if config.precision != "auto":
        return config.precision
    return machine.auto_precision(device) if device == "cuda" else "fp32"


def class_weights(config: TrainingConfig, ids: np.ndarray, classes: int) -> Any:
    """float32 [C]; their mean over the images is 1."""
    if config.class_weights == "none":
        return torch.ones(classes)
    counts = np.bincount(ids, minlength=classes)
    return torch.tensor(
        len(ids) / (np.count_nonzero(counts) * np.maximum(counts, 1)), dtype=torch.float32
    )
