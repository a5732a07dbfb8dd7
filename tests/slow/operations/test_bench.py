"""vitray bench: what it says hangs together, and it writes nothing to the job's out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitray.job import Job
from vitray.operations.bench import bench
from vitray.pipeline import run


@pytest.mark.timing
def test_bench_times_every_step_and_names_the_limit(
    inputs: str, shapes_model: str, tmp_path: Path
) -> None:
    job = Job(
        source=inputs,
        model=shapes_model,
        out=str(tmp_path / "out"),
        device="cpu",
        engine="torch",
        batch_size=8,
    )
    found = bench(job, images=64, seconds=0.5)
    assert (found.images, found.cores, found.engine, found.batch_size) == (
        64,
        len(os.sched_getaffinity(0)),
        "torch",
        8,
    )
    rates = {"read": found.read, "decode": found.decode, "model": found.model, "line": found.line}
    assert min(rates.values()) > 1 and 0.1 < found.first_rows_s < 60
    assert found.model < found.ceiling and found.line < 2 * min(
        found.read, found.decode, found.model
    )  # noise
    slowest = min(("read", "decode", "model"), key=lambda step: rates[step])
    shared = 1 / (1 / found.decode + 1 / found.model)  # by the cores of a CPU
    assert found.limit == (slowest if found.line >= 0.9 * min(rates[slowest], shared) else "line")
    limit = "between the stages" if found.limit == "line" else found.limit
    assert f"limit: {limit}" in str(found)
    assert not (tmp_path / "out").exists()


def test_what_the_dataset_has_settled_is_measured_and_not_decided_again(
    inputs: str, shapes_model: str, tmp_path: Path
) -> None:
    fields = {
        "source": inputs,
        "model": shapes_model,
        "out": str(tmp_path / "out"),
        "device": "cpu",
    }
    run(Job(**fields, engine="onnx", batch_size=5, limit=1))
    found = bench(Job(**fields), images=32, seconds=0.1)
    assert (found.engine, found.precision, found.batch_size) == ("onnx", "fp32", 5)
    assert (found.device, found.gpus) == ("cpu", 0)
    assert (
        found.out_kilobytes > 0.25
    )  # 64 floats a row: what repeats in the pipeline is not counted


def test_a_bench_that_is_interrupted_leaves_nothing(
    inputs: str, shapes_model: str, tmp_path: Path
) -> None:
    job = [inputs, "--model", shapes_model, "--set", "engine=torch", "--set", "device=cpu"]
    argv = [sys.executable, "-m", "vitray", "bench", *job, "--images", "32", "--seconds", "3"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    heard = {
        "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    }  # under nohup it is not
    running = subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}, **heard
    )
    while not list(
        scratch.glob("vitray-bench-*/*/out/data/*")
    ):  # the model is open: that may take longer than a signal waits
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGHUP)
    said = running.communicate(timeout=30)[1]
    assert running.returncode == 129 and "interrupted; run the same command again." in said
    assert list(scratch.glob("vitray-bench-*")) == []
