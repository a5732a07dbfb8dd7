"""The figures that fine-tuning has to reach, on scikit-learn's digits: each is printed, and judged
on images that no training saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from factories import digits
from support.digit_trainings import train

pytestmark = [pytest.mark.timeout(1500), pytest.mark.usefixtures("one_thread")]


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
