"""`vitray bench --free-model`: a small measurement of the local executor, start to end."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from support.command_line import Call
from vitray.errors import JobError
from vitray.job import Job
from vitray.operations import bench_free
from vitray.operations.bench_free_figures import Slope, TimedRun


@pytest.fixture(autouse=True)
def only_local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Leaves Ray out, which takes a minute; returns the folder of temporary files."""
    ways = bench_free.runs_by_way

    def local_alone(*arguments: object) -> dict[object, object]:
        found = ways(*arguments)
        return {way: found[way] for way in list(found)[:1]}

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(bench_free, "runs_by_way", local_alone)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


def test_the_pipeline_is_timed_with_a_free_model(
    vitray: Call, inputs: str, only_local: Path
) -> None:
    code, out, err = vitray(
        "bench", inputs, "--free-model", "100", "--images", "64", "--seconds", "0.1", "--json"
    )
    assert code == 0 and "\nround 1 of 3, local: " in err
    found = json.loads(out)
    assert (found["images"], found["microseconds"], found["rounds"]) == (64, 100, 3)
    shorter, longer = found["sizes"]
    assert shorter >= 64 and longer == 4 * shorter
    local = found["ways"]["local"]
    assert local["images_per_s"] > 1
    assert local["feeds_gpus"] == pytest.approx(local["images_per_s"] / 10_000)
    assert {"read", "decode", "predict", "stage"} <= local["stages"].keys()
    assert local["busiest"] in local["stages"]
    assert local["cpu_ms_per_image"] >= 0
    assert list(only_local.iterdir()) == []


def test_the_table_has_a_row_for_the_local_executor(vitray: Call, inputs: str) -> None:
    code, out, _ = vitray("bench", inputs, "--free-model", "0", "--seconds", "0.1")
    assert code == 0
    assert "local executor" in out and "GPUs fed: at 12,000 images/s" in out


def test_a_disturbed_pair_of_runs_is_repeated_and_otherwise_left_out(
    inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench_free.slope
    attempts: list[bool] = []

    def disturbed(shorter: TimedRun, longer: TimedRun) -> Slope | None:
        """The first pair, and all of the second round."""
        attempts.append(len(attempts) in (0, 2, 3, 4))
        even_longer = replace(longer, seconds=shorter.seconds + 1)
        return None if attempts[-1] else real(shorter, even_longer)

    monkeypatch.setattr(bench_free, "slope", disturbed)
    job = Job(source=inputs, model="free", out=str(tmp_path / "out"))
    result = bench_free.bench_free(job, images=20, seconds=0.01)
    assert len(attempts) == 2 + bench_free.ATTEMPTS + 1
    assert (result.rounds, result.ways["local"].rounds) == (3, 2)


def test_runs_that_are_always_disturbed_are_an_error(
    inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_free, "slope", lambda *_: None)
    job = Job(source=inputs, model="free", out=str(tmp_path / "out"))
    with pytest.raises(JobError, match=r"local executor: .* larger --seconds"):
        bench_free.bench_free(job, images=20, seconds=0.01, rounds=1)


def test_images_that_cannot_be_decoded_are_refused(inputs: str, tmp_path: Path) -> None:
    job = Job(source=inputs, model="free", out=str(tmp_path / "out"), max_pixels=10)
    with pytest.raises(JobError, match="none of the first 20 images can be decoded"):
        bench_free.bench_free(job, images=20, seconds=0.1)
