"""vitray bench: what it says hangs together, and it writes nothing to the job's out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitray.cli import app
from vitray.errors import JobError
from vitray.job import Job
from vitray.operations.bench import bench


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


def test_bench_of_nothing_says_so(shapes_model: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(JobError):
        bench(Job(source=str(tmp_path / "in"), model=shapes_model, out=str(tmp_path / "out")))
