"""`vitray run` on the command line: its arguments, its summary and its refusals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import vitray
from factories.shards import Picture, pictures, put, put_tars
from support.runs import command, images_by_step, lines_of, start
from support.whole_runs import shape_job


def test_a_store_that_fails_in_the_middle_is_one_sentence(
    ray: None, tmp_path: Path, shapes_model: str, items: list[Picture]
) -> None:
    put_tars(str(tmp_path / "in"), items[:40], 1, tmp_path)
    job = shape_job(str(tmp_path / "in"), shapes_model, str(tmp_path / "out"), fragment_rows=16)
    put(f"{job.out}/_vitray/staging", b"in the way of a folder")
    with pytest.raises(vitray.VitrayError, match=r"staging/s_000.*-.*\.arrow: ") as caught:
        vitray.run(job)
    assert (
        "Traceback" not in str(caught.value)
        and "\n" not in str(caught.value)
        and len(str(caught.value)) < 400
    )
    os.remove(tmp_path / "out" / "_vitray" / "staging")
    assert vitray.run(job).rows == 40


def test_all_stages_run_in_one_process_of_a_machine(shapes_model: str, tmp_path: Path) -> None:
    """Rows and pixels stay in it; only events reach the driver."""
    put_tars(str(tmp_path / "in"), pictures(64), 2, tmp_path)
    trace = tmp_path / "trace"
    process = start(command(tmp_path, shapes_model, tmp_path / "out", "--address", "local"), trace)
    _, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    pids = {(str(line["step"]), line["pid"]) for line in lines_of(trace)}
    assert {step for step, _ in pids} == {"read", "decode", "predict", "stage"}
    assert len({pid for _, pid in pids}) == 1 and process.pid not in {pid for _, pid in pids}
    assert images_by_step(trace) == dict.fromkeys(("read", "decode", "predict", "stage"), 64)
