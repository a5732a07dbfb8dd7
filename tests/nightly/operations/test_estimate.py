"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars
from support.schemas import checked
from vitray.storage import store_for

VITRAY = [sys.executable, "-m", "vitray"]


def test_the_plan_for_drawn_shapes_comes_true_within_a_quarter(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(600), 6, tmp_path)
    over = []
    for n in range(3):
        job = [f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out-{n}"]
        planned = subprocess.run(
            [*VITRAY, "plan", *job, "--probe", "200", "--json"],
            capture_output=True,
            timeout=240,
            check=True,
        )
        (tmp_path / "plan.json").write_bytes(planned.stdout)
        assert checked(planned.stdout)["images"] == pytest.approx(600, rel=0.05)
        subprocess.run(
            [*VITRAY, "run", *job, "--planned", f"{tmp_path}/plan.json"],
            capture_output=True,
            timeout=240,
            check=True,
        )
        (record,) = (tmp_path / f"out-{n}" / "_vitray" / "runs").glob("*.json")
        over.append(json.loads(record.read_text())["seconds_over_planned"])
    print(over)
    real = sum(path.stat().st_size for path in (tmp_path / "out-0" / "data").iterdir())
    assert json.loads(planned.stdout)["out_bytes"] == pytest.approx(
        real, rel=0.4
    )  # a footer a file, whatever is in it
    assert 0.75 <= sorted(over)[1] <= 1.25


def test_a_plan_with_everything_on_s3_measures_there_and_leaves_nothing(
    shapes_model: str, s3: str, tmp_path: Path
) -> None:
    put_tars(f"{s3}/in", pictures(96), 3, tmp_path)
    before = [info.url for info in store_for(s3).find(s3)]
    job = [f"{s3}/in/*.tar", "--model", shapes_model, "--out", f"{s3}/out", "--set", "engine=torch"]
    done = subprocess.run(
        [*VITRAY, "plan", *job, "--probe", "32", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = checked(done.stdout)
    assert (
        said["images"] == pytest.approx(96, rel=0.1)
        and said["seconds"] > 0
        and said["out_bytes"] > 0
    )
    assert [info.url for info in store_for(s3).find(s3)] == before
