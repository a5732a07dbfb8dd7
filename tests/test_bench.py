"""vitray bench: what it says hangs together, and it writes nothing to the job's out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shards import pictures, put_tars
from typer.testing import CliRunner

from vitray.cli import app
from vitray.errors import JobError
from vitray.job import Job
from vitray.models import identify
from vitray.operations.bench import bench
from vitray.pipeline import run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench")
    put_tars(str(folder / "in"), pictures(96), 2, folder)
    return str(folder / "in")


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


def test_bench_speaks_json_on_the_command_line(
    inputs: str, shapes_model: str, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"source: {inputs}\nmodel: {shapes_model}\nout: {tmp_path / 'out'}\ndevice: cpu\nengine: "
        f"torch\n"
    )
    answer = CliRunner().invoke(
        app, ["bench", str(job), "--images", "32", "--seconds", "0.5", "--json"]
    )
    assert answer.exit_code == 0, answer.output
    said = json.loads(answer.stdout.splitlines()[-1])
    assert said["images"] == 32 and said["limit"] in ("read", "decode", "model", "line")


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


def test_a_bench_of_images_that_are_none_is_refused(
    inputs: str, shapes_model: str, tmp_path: Path
) -> None:
    fields = {
        "source": inputs,
        "model": shapes_model,
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "engine": "torch",
    }
    with pytest.raises(
        JobError, match=r"none of the first 20 images can be decoded \(too_many_pixels\)"
    ):
        bench(Job(**fields, max_pixels=10), images=20)


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


def test_bench_of_nothing_says_so(shapes_model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(JobError):
        bench(Job(source=str(tmp_path / "in"), model=shapes_model, out=str(tmp_path / "out")))


def test_the_ceiling_counts_the_operations_of_the_paper(tmp_path: Path) -> None:
    """ViT-B/16 at 224: 35.13 billion operations, a multiply-add counted as two."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from vitray.models.machine import flop_per_image, roofline

    config = ViTConfig(
        num_hidden_layers=12,
        hidden_size=96,
        num_attention_heads=3,
        intermediate_size=384,
        num_labels=4,
    )
    ViTForImageClassification(config).save_pretrained(str(tmp_path))
    ViTImageProcessorPil().save_pretrained(str(tmp_path))
    spec = identify(Job(source="in", model=str(tmp_path), out="out", device="cpu", engine="torch"))
    tokens, width = 197, 96
    by_hand = 12 * (12 * tokens * width**2 + 2 * tokens**2 * width) + 196 * 768 * width
    assert flop_per_image(spec) == 2 * by_hand
    assert 2 * (
        12 * (12 * tokens * 768**2 + 2 * tokens**2 * 768) + 196 * 768 * 768
    ) == pytest.approx(35.13e9, rel=1e-3)
    images, rate = roofline(spec, "cpu")
    assert images == pytest.approx(rate / flop_per_image(spec)) and rate > 1e9
