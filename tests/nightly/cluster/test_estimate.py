"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from support.clusters import cluster_of

VITRAY = [sys.executable, "-m", "vitray"]


@pytest.mark.timeout(900)
def test_the_plan_for_a_cluster_comes_true_within_a_quarter(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(2400), 6, tmp_path)
    job = (f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out")
    with cluster_of(1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as cluster:

        def vitray_there(*argv: str) -> bytes:
            argv = (*VITRAY, *argv, "--address", cluster.address, "--json")
            return subprocess.run(
                argv, capture_output=True, timeout=400, check=True, env=cluster.environment
            ).stdout

        planned = vitray_there("plan", *job, "--probe", "200")
        assert not (tmp_path / "out").exists()  # what it wrote there is gone
        said = json.loads(planned)
        assert (
            said["machines"] == 1
            and f"on Ray at {cluster.address}: each step alone on" in said["measured"]
        )
        (tmp_path / "plan.json").write_bytes(planned)
        vitray_there("run", *job, "--planned", f"{tmp_path}/plan.json")
    (record,) = (tmp_path / "out" / "_vitray" / "runs").glob("*.json")
    over = json.loads(record.read_text())["seconds_over_planned"]
    print(said, over)
    assert 0.75 <= over <= 1.25


@pytest.mark.timeout(900)
def test_a_plan_of_a_cluster_that_is_killed_leaves_what_later_ones_remove(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(600), 3, tmp_path)
    job = (f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out")
    left = tmp_path / "out" / "_vitray"
    with cluster_of(1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as cluster:

        def killed(number: int) -> tuple[int, str]:
            argv, begun = (
                [*VITRAY, "plan", *job, "--probe", "200", "--address", cluster.address],
                "probe-*/*/out/_vitray/dataset.json",
            )
            older = set(left.glob(begun))
            running = subprocess.Popen(
                argv, stderr=subprocess.PIPE, text=True, env=cluster.environment
            )
            while not set(left.glob(begun)) - older:
                assert running.poll() is None, running.stderr
                time.sleep(0.1)
            running.send_signal(number)
            return running.wait(30), (running.stderr or sys.stderr).read()

        assert killed(signal.SIGKILL)[0] == -9
        (folder,) = left.glob("probe-*")
        time.sleep(5)  # until the cluster has ended what belonged to it
        for path in folder.rglob("*"):
            os.utime(path, (time.time() - 4000,) * 2)
        code, said = killed(signal.SIGINT)
        assert code == 130 and said.endswith(
            "interrupted; no plan was made. Temporary files may remain in `out`; "
            "the next vitray plan --probe, run or clean removes them.\n"
        )
        assert not folder.exists()
        (folder,) = left.glob("probe-*")
        time.sleep(5)
    run = [*VITRAY, "run", *job]
    assert (
        subprocess.run(run, capture_output=True, timeout=120).returncode == 0 and folder.exists()
    )  # its owner may be at work
    assert vitray.read(f"{tmp_path}/out").num_rows == 600
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 4000,) * 2)
    assert (
        subprocess.run(run, capture_output=True, timeout=120).returncode == 0
        and not folder.exists()
    )
