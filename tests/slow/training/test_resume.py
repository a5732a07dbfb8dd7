"""A training that is killed, taken over or out of space goes on, or ends with one error."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load

from factories import digits
from support.training_runs import embedded, equal, start, weights, write_config
from vitray.decoding.decode import load_decoders
from vitray.models.linear_head import read_head
from vitray.storage import read, store_for
from vitray.training import checkpoints
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


def test_everything_may_lie_on_s3_and_a_killed_training_goes_on_there(
    small: dict[str, object], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, labels = digits.load()
    (tmp_path / "labels.csv").write_text(
        "\n".join(["key,digit", *(f"{labels[n]}/{n:04d},{labels[n]}" for n in digits.few(20))])
    )
    files = {"in/digits.tar": small["source"], "labels.csv": tmp_path / "labels.csv"}
    files |= {f"model/{path.name}": path for path in Path(str(small["model"])).iterdir()}
    for name, path in files.items():
        store_for(s3).create(f"{s3}/{name}", Path(str(path)).read_bytes())
    joined = {"label": "digit", "label_table": str(tmp_path / "labels.csv"), "table_key": "key"}
    fields = {**small, **joined, "save_steps": 3, "mixup": 0.2, "validation": 0.2}
    whole = finetune(TrainingConfig(**fields, out=str(tmp_path / "whole")))
    there = {
        "source": f"{s3}/in/*.tar",
        "model": f"{s3}/model",
        "label_table": f"{s3}/labels.csv",
        "out": f"{s3}/out",
    }
    path = write_config(tmp_path / "killed.yaml", {**fields, **there})
    done = start(path, VITRAY_CRASH_AT="train-step:7")
    assert done.returncode == -9, done.stderr[-2000:]
    found = checkpoints.load(f"{s3}/out/_vitray/state", "last")
    assert found is not None and found[1]["step"] == 6
    again = finetune(TrainingConfig(**{**fields, **there}))
    assert again.figures == whole.figures and again.model
    kept = {info.url.removeprefix(f"{s3}/out/") for info in store_for(s3).find(f"{s3}/out")}
    assert {"config.json", "model.safetensors", "report.html", "_vitray/result.json"} <= kept
    state = [
        name for name in kept if name.startswith("_vitray/state/") and name.endswith(".safetensors")
    ]
    assert sorted(name.split("/")[-1].partition("-")[0] for name in state) == ["best", "last"]
    assert not any((tmp_path / "cache" / "vitray" / "finetune").rglob("*.u8"))
    # what was written there is a model, of a run and of the next training; and a probe's dataset
    assert equal(load(read(f"{s3}/out/model.safetensors")), weights(str(tmp_path / "whole")))
    dataset = embedded(f"{s3}/out", there["source"], f"{s3}/dataset")
    probe = finetune(
        TrainingConfig(
            dataset=dataset, train="probe", label="cls", validation=0.2, out=f"{s3}/probe"
        )
    )
    assert probe.images + probe.held_out == 200 and read_head(f"{s3}/probe").labels == tuple(
        "0123456789"
    )
    later = finetune(
        TrainingConfig(
            **{
                **fields,
                **there,
                "model": f"{s3}/out",
                "init": "weights",
                "train": "head",
                "out": f"{s3}/later",
            }
        )
    )
    assert (later.epochs, later.model) == (3, True)


TRAINING_PROGRESS = '{"schema": "vitray/training-progress/'


def test_no_space_is_one_clear_error(small: dict[str, object], tmp_path: Path) -> None:
    path = write_config(tmp_path / "job.yaml", {**small, "out": str(tmp_path / "out")})
    limit = 100_000  # bytes a file may have: less than the decoded images take
    load_decoders("exact")  # Numba keeps what it compiled in a file that is larger

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "vitray", "finetune", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=few_bytes,
    )
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("StorageError: ")
        and "free some" in done.stderr
    ), done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith(TRAINING_PROGRESS)]
    assert len(said) == 1 and not list((tmp_path / "out").rglob("*.u8"))


def test_killed_training_ends_with_equal_weights(small: dict[str, object], tmp_path: Path) -> None:
    fields = {**small, "save_steps": 3, "mixup": 0.2, "flip": True}
    whole = finetune(TrainingConfig(**fields, out=str(tmp_path / "whole")))
    path = write_config(tmp_path / "killed.yaml", {**fields, "out": str(tmp_path / "killed")})
    # within an epoch, behind its last checkpoint; and between two objects of a checkpoint
    for point in ("train-step:8", "object-written"):
        done = start(path, VITRAY_CRASH_AT=point)
        assert done.returncode == -9, done.stderr[-2000:]
    done = start(path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert equal(weights(str(tmp_path / "whole")), weights(str(tmp_path / "killed")))
    both = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert re.search(r": resuming from step \d+ of 12\n", done.stderr)
    assert (
        both[0] == both[1]
        and "epoch 3: loss" in done.stderr
        and f"{whole.figures['validation_accuracy']:.4g}" in done.stdout
    )
    left = [
        p.name
        for p in (tmp_path / "killed" / "_vitray" / "state").iterdir()
        if p.suffix == ".safetensors"
    ]
    assert sorted(name.partition("-")[0] for name in left) == ["best", "last"]
