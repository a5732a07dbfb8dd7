"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars
from support.paths import TESTS
from support.s3 import free_port

MODEL = TESTS / "data" / "dataset-v1" / "model"
VITRAY = [sys.executable, "-m", "vitray"]


def test_a_plan_that_is_none_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"images": 3}')
    argv = [
        *VITRAY,
        "run",
        "nowhere",
        "--model",
        "m",
        "--out",
        str(tmp_path / "out"),
        "--planned",
        str(tmp_path / "plan.json"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--planned" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [["--address", "head:6379"], ["--machines", "2"], ["--prices", "prices.yaml"]]
)
def test_what_only_a_probe_takes_is_refused_without_one(option: list[str], tmp_path: Path) -> None:
    argv = [*VITRAY, "plan", f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out", *option]
    alone = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2 and alone.stderr.startswith(
        f"JobError: {option[0]}: only --probe N measures"
    )


def test_a_cluster_that_is_none_is_one_line(tmp_path: Path) -> None:
    put_tars(f"{tmp_path}/in", pictures(4), 1, tmp_path)
    job = [f"{tmp_path}/in", "--model", str(MODEL), "--out", f"{tmp_path}/out"]
    argv = [*VITRAY, "plan", *job, "--address", f"127.0.0.1:{free_port()}"]
    nobody = subprocess.run(
        [*argv, "--probe", "4", "--json"], capture_output=True, text=True, timeout=120
    )
    assert nobody.returncode == 1 and nobody.stdout == "" and nobody.stderr.count("\n") == 1
    assert (
        nobody.stderr.startswith("ClusterError: Ray at 127.0.0.1:")
        and not (tmp_path / "out").exists()
    )
