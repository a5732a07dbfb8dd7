"""A training that is killed, taken over or out of space goes on, or ends with one error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from support.schemas import checked
from support.training_runs import equal, weights
from vitray.cli.json_output import json_text
from vitray.errors import ClusterError, StorageError
from vitray.models import checkpoint_store
from vitray.storage import store_for
from vitray.training import checkpoints, outputs, workers
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune
from vitray.training.outcome import TrainingOutcome
from vitray.training.student import prepare
from vitray.training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")


def test_workers_that_never_begin_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "POLL_S", 0.01)
    monkeypatch.setattr(workers, "START_S", 0.2)
    never, mark = threading.Event(), tmp_path / "began"
    with pytest.raises(ClusterError, match=r"no worker has begun in 0\.2 s\. Look at `ray status`"):
        workers.run_watched(never.wait, str(mark))
    mark.touch()
    workers.run_watched(lambda: time.sleep(0.5), str(mark))  # who has begun may take his time
    with pytest.raises(ClusterError, match=r"the training failed: 'no such thing'\. Run again"):
        workers.run_watched(lambda: {}["no such thing"], str(mark))
    never.set()


def test_states_replace_each_other_and_damage_is_seen(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "PART_BYTES", 100)
    tensors = {name: torch.randn(20) for name in "abc"}
    assert checkpoints.load(root, "last") is None
    checkpoints.save(root, "last", {"a": torch.zeros(2)}, {"step": 1})
    checkpoints.save(root, "last", tensors, {"step": 2, "loss": 0.1 + 0.2})
    found, numbers = checkpoints.load(root, "last") or ({}, {})
    assert equal(found, tensors) and numbers == {"step": 2, "loss": 0.1 + 0.2}
    objects = [info.url for info in store_for(root).find(root)]
    assert len(objects) == 4  # three parts and their list; the first state is gone
    part = next(url for url in objects if url.endswith(".safetensors"))
    store_for(root).replace(part, b"x")
    with pytest.raises(StorageError, match="damaged"):
        checkpoints.load(root, "last")
    store_for(root).replace(f"{root}/last-orphan.safetensors", b"x")
    checkpoints.sweep(root)
    assert sorted(info.url for info in store_for(root).find(root)) == objects


def test_a_damaged_or_foreign_checkpoint_of_a_killed_training_is_one_error(
    small: dict[str, object], tmp_path: Path
) -> None:
    fields = {**small, "save_steps": 3, "out": str(tmp_path / "out")}
    state = tmp_path / "out" / "_vitray" / "state"
    with pytest.raises(InterruptedError):
        finetune(TrainingConfig(**fields), report=stop)
    pointer, (part,) = state / "last.json", state.glob("last-*")
    before = {path: path.read_bytes() for path in (pointer, part)}
    wide = {name: torch.zeros(99) for name in (checkpoints.load(str(state), "last") or ({},))[0]}

    def foreign() -> None:
        checkpoints.save(str(state), "last", wide, json.loads(before[pointer])["numbers"])

    for spoil, says in (
        (lambda: part.write_bytes(before[part][:-1]), f"is damaged ({part.name} changed)"),
        (lambda: part.unlink(), f"is damaged ({part} does not exist)"),
        (lambda: pointer.write_bytes(before[pointer][:-1]), "is damaged (last.json: "),
        (lambda: pointer.write_bytes(b"[]"), "is damaged (last.json: "),
        (foreign, "is of another training: module."),
    ):
        spoil()
        with pytest.raises(StorageError) as raised:
            finetune(TrainingConfig(**fields))
        said = str(raised.value)
        assert says in said and said.endswith("to train from the start.") and "\n" not in said
        for path, data in before.items():
            path.write_bytes(data)
    shutil.rmtree(state)
    assert finetune(TrainingConfig(**fields)).epochs == 3


def stop(_record: dict[str, float]) -> None:
    raise InterruptedError


def test_a_training_that_another_machine_took_over_ends_and_spoils_nothing(
    small: dict[str, object], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    epochs: list[float] = []
    states: dict[str, bytes] = {}

    def tell(record: dict[str, float]) -> None:
        epochs.append(record["epoch"])
        if record["epoch"] == 1:
            checkpoints.take_over(f"{out}/_vitray/state", "another")
            states.update(
                {
                    name: Path(out, "_vitray", "state", name).read_bytes()
                    for name in ("best.json", "last.json")
                }
            )

    with pytest.raises(
        StorageError, match=r"another command, on another machine, now trains into .*/state"
    ):
        finetune(TrainingConfig(**small, out=out), tell)  # the second epoch is the best so far
    assert epochs == [1] and not os.path.exists(f"{out}/config.json")
    assert states == {
        name: Path(out, "_vitray", "state", name).read_bytes() for name in states
    }  # what is the other's now
    finetune(TrainingConfig(**small, out=out))
    whole = finetune(TrainingConfig(**small, out=str(tmp_path / "whole")))
    assert checked(json_text(whole))["schema"] == "vitray/finetune/v1"
    assert whole.epochs == 3 and equal(weights(out), weights(str(tmp_path / "whole")))


def test_a_checkpoint_before_the_first_update_is_one(
    small: dict[str, object], tmp_path: Path
) -> None:
    """fp16 skips steps that overflow, and may begin with some."""
    training_run = TrainingRun.of(TrainingConfig(**small, out=str(tmp_path / "out")))
    fitting = training_run.fitting()
    fitting.save()
    again = training_run.fitting()
    again.scaler = torch.amp.GradScaler("cpu", enabled=True)  # begun in fp32, goes on in fp16
    again.restore()
    assert again.progress.step == 0 and not again.optimizer.state
    again.run(lambda record: None)
    assert again.progress.done


def test_a_disk_that_is_full_when_the_checkpoint_is_written_is_one_error(
    small: dict[str, object], tmp_path: Path
) -> None:
    found = checkpoint_store.locate(str(small["model"]), None)
    config = TrainingConfig(**{**small, "out": str(tmp_path / "out")})
    outcome = TrainingOutcome(config, found, ("a", "b"), [], [], {}, None)
    module = prepare(config, found, outcome.classes, None).finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"File too large.*\. Free some space there, then run again"
        ) as raised:
            outputs.write(outcome, module, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()
