"""The figures that fine-tuning has to reach, on scikit-learn's digits: each is printed, and judged
on images that no training saw.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import digits
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import vitray
from vitray.training.config import TrainingConfig
from vitray.training.finetuning import finetune

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1500), pytest.mark.usefixtures("one_thread")]
SHOTS = 50  # of each digit
SCRATCH = digits.SCRATCH
BACKBONE = {
    **SCRATCH,
    "label_smoothing": 0.0,
    "mixup": 0.4,
    "validation": 0.0,
    "epochs": 40,
    "lr": 1e-3,
}
PATIENT = {"label_smoothing": 0.0, "mixup": 0.4, "validation": 0.0, "epochs": 600, "lr": 4e-3}
WAYS: dict[str, dict[str, object]] = {
    "full": {"lr": 5e-4},
    "head": {"lr": 1e-2, "epochs": 100, "mixup": 0.0, "crop": 0.8},
    "last": {"lr": 5e-4},
    "lora": {"lr": 2e-3},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.tar, shots.tar (50 a class, of train), eight.tar (train, without 8 and 9), unseen.tar;
    model/ without weights.
    """
    folder = tmp_path_factory.mktemp("digits")
    digits.tar(folder / "train.tar", digits.few(digits.TRAINED))
    digits.tar(folder / "shots.tar", digits.few(SHOTS))
    digits.tar(folder / "eight.tar", digits.few(digits.TRAINED, range(8)))
    digits.tar(folder / "unseen.tar", digits.few(1000, skip=digits.TRAINED))
    digits.model(folder / "model")
    digits.model(folder / "wide", width=128, layers=3)
    return folder


def train(home: Path, name: str, **fields: object) -> str:
    out = str(home / name)
    source = (
        {}
        if fields.get("dataset")
        else {"source": str(home / "train.tar"), "model": str(home / "model")}
    )
    return finetune(TrainingConfig(**{**source, **fields, "out": out})).out


def label(home: Path, model: str, what: str = "unseen", **more: object) -> str:
    """A dataset of images by a model; what was there is taken again."""
    out = home / f"{Path(model).name}-on-{what}"
    job = vitray.Job(
        source=str(home / f"{what}.tar"),
        model=model,
        out=str(out),
        keep=["cls"],
        precision="fp32",
        engine="torch",
        **more,
    )
    vitray.run(job)
    return job.out


def accuracy(home: Path, model: str) -> float:
    rows = vitray.read(label(home, model), ["label", "cls"])
    return float(
        np.mean(
            [said == true for said, true in zip(rows["label"].to_pylist(), rows["cls"].to_pylist())]
        )
    )


@pytest.fixture(scope="module")
def teacher(home: Path) -> str:
    torch.set_num_threads(1)
    return train(home, "teacher", **SCRATCH, validation=0.1)


def test_digits_from_scratch_reach_97_percent(home: Path, teacher: str) -> None:
    found = accuracy(home, teacher)
    print(f"digits, tiny ViT from scratch: {found:.4f} of 597 unseen images")
    assert found >= 0.97


def test_two_new_digits_are_learnt_from_fifty_images_each_way(home: Path) -> None:
    backbone = train(
        home, "backbone", **BACKBONE, source=str(home / "eight.tar"), model=str(home / "wide")
    )
    shots = {
        **digits.CONFIG,
        "source": str(home / "shots.tar"),
        "model": backbone,
        "validation": 0.0,
        "epochs": 30,
        "mixup": 0.2,
    }
    ways = {name: {**shots, "train": name, **more} for name, more in WAYS.items()}
    found = {name: accuracy(home, train(home, name, **fields)) for name, fields in ways.items()}
    dataset = label(home, backbone, "shots", labels=False)
    started = time.monotonic()
    probe = train(home, "probe", dataset=dataset, train="probe", label="cls", validation=0.0)
    seconds = time.monotonic() - started
    found["probe"] = accuracy(home, probe)
    print(f"8 digits -> 10, {SHOTS} images a class: {found}; probe in {seconds:.1f} s")
    assert seconds < 10
    assert all(found[name] >= found["full"] - 0.02 for name in ("probe", "head", "last", "lora"))


def test_a_student_of_a_quarter_comes_near_its_teacher(home: Path) -> None:
    """Teacher, student alone and student taught see the same 200 images; the taught one learns from
    the teacher alone. Three seeds.

    The settings were chosen on the other 1,000 of the 1,200 images: BENCHMARKS.md has the way, and
    set-ups in which a teacher does not help.
    """
    few, figures = digits.tar(home / "few.tar", digits.few(20)), list[tuple[float, float, float]]()
    large, small = (
        digits.model(home / "large", width=36, layers=3),
        digits.model(home / "small", width=16, layers=3),
    )
    for seed in range(3):
        fields = {**SCRATCH, **PATIENT, "source": few, "seed": seed}
        teacher = train(home, f"teacher-{seed}", **{**fields, "model": large, "lr": 2e-3})
        alone = train(home, f"alone-{seed}", **{**fields, "model": small})
        taught = train(
            home,
            f"taught-{seed}",
            **{**fields, "model": small},
            teacher_model=teacher,
            teacher_weight=1.0,
        )
        figures.append((accuracy(home, teacher), accuracy(home, alone), accuracy(home, taught)))
        print(f"seed {seed}: teacher, student alone, student taught: {figures[-1]}", flush=True)
    sizes = [
        sum(t.numel() for t in load_file(f"{out}/model.safetensors").values())
        for out in (teacher, taught)
    ]
    means = np.mean(figures, 0)
    print(
        f"student of {sizes[1] / sizes[0]:.2f} of its teacher's {sizes[0]:,} weights: teacher, "
        f"alone, taught {means.round(4)}"
    )
    assert sizes[1] <= sizes[0] / 4 * 1.05
    assert means[2] >= means[0] - 0.02 and means[2] > means[1]


def test_killed_at_random_steps_it_ends_with_equal_weights(home: Path) -> None:
    fields = {
        **digits.CONFIG,
        "source": str(home / "shots.tar"),
        "model": str(home / "model"),
        "train": "full",
        "init": "scratch",
    }
    fields |= {"epochs": 6, "save_steps": 4, "mixup": 0.2, "flip": True}
    whole = train(home, "whole", **fields)
    path = home / "killed.yaml"
    path.write_text(
        "".join(
            f"{name}: {json.dumps(value)}\n"
            for name, value in {**fields, "out": str(home / "killed")}.items()
        )
    )
    known, rng, kills = {**os.environ, "OMP_NUM_THREADS": "1"}, random.Random(0), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "vitray", "finetune", str(path)],
            env=known,
            stderr=subprocess.PIPE,
            text=True,
        )
        state = home / "killed" / "_vitray" / "state"
        before = set(state.glob("last*")) if state.exists() else set()
        while (
            kills < 6
            and process.poll() is None
            and (not state.exists() or set(state.glob("last*")) == before)
        ):
            time.sleep(0.01)
        if kills < 6 and process.poll() is None:  # at any moment after a first step of its own
            time.sleep(rng.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
        kills += 1
    one, two = (
        load_file(f"{whole}/model.safetensors"),
        load_file(home / "killed" / "model.safetensors"),
    )
    print(
        f"killed {kills} times; equal weights: "
        f"{all(torch.equal(one[name], two[name]) for name in one)}"
    )
    assert (
        kills >= 3
        and one.keys() == two.keys()
        and all(torch.equal(one[name], two[name]) for name in one)
    )


@pytest.mark.ray
def test_two_workers_have_the_loss_curve_of_one(home: Path, ray: None) -> None:
    fields = {
        **digits.CONFIG,
        "train": "full",
        "init": "scratch",
        "epochs": 4,
        "mixup": 0.2,
        "flip": True,
        "device": "cpu",
    }
    curves = []
    for workers in (1, 2):
        out = train(home, f"workers-{workers}", **fields, workers=workers)
        records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        curves.append(
            [
                (record["step"], record["loss"], record.get("validation_loss", 0.0))
                for record in records
            ]
        )
    gap = np.abs(np.array(curves[0]) - np.array(curves[1])).max()
    print(f"2 workers against 1, {len(curves[0])} losses: largest difference {gap:.2g}")
    assert len(curves[0]) == len(curves[1]) > 60 and gap < 1e-3


@pytest.mark.ray
def test_a_worker_that_dies_costs_what_came_after_the_last_checkpoint(home: Path) -> None:
    fields = {
        **digits.CONFIG,
        "source": str(home / "shots.tar"),
        "model": str(home / "model"),
        "train": "full",
    }
    fields |= {"init": "scratch", "epochs": 6, "device": "cpu", "workers": 2}
    path, weights = home / "group.yaml", []
    path.write_text(
        "".join(
            f"{name}: {json.dumps(value)}\n" for name, value in {**fields, "out": "given"}.items()
        )
    )
    for name in ("whole-group", "group-of-which-one-dies"):
        out = home / name
        argv = [
            sys.executable,
            "-m",
            "vitray",
            "finetune",
            str(path),
            "--set",
            f"out={out}",
            "--json",
        ]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        process = subprocess.Popen(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if weights:
            while not (out / "_vitray" / "state" / "last.json").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            group = [
                p
                for p in psutil.Process(process.pid).children(recursive=True)
                if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            assert len(group) == 2
            group[0].kill()
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        weights.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
