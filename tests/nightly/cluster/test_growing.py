"""A cluster that grows in the middle of a run."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from pathlib import Path

from factories.shards import pictures, put_tars
from support.clusters import RUN, Cluster, cluster_of

IMAGES = 12_000


def demands(cluster: Cluster) -> str:
    """What `ray status`, and so an autoscaler, sees of actors that wait for a machine."""
    ray = str(Path(sys.executable).with_name("ray"))
    argv = [ray, "status", f"--address={cluster.address}"]
    done = subprocess.run(
        argv, env=cluster.environment, capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout.partition("Pending Demands:")[2]


def test_a_run_asks_for_a_machine_and_uses_the_one_that_comes(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(str(tmp_path / "in"), pictures(IMAGES), 600, tmp_path)
    trace = tmp_path / "trace"
    trace.mkdir()
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    with cluster_of(1, **environment, VITRAY_TRACE=str(trace)) as cluster:
        argv = [*RUN, str(tmp_path / "in"), "--model", shapes_model, "--out", f"{tmp_path}/out"]
        argv += ["--set", "fragment_rows=16", "--address", cluster.address, "--json"]
        run = subprocess.Popen(
            argv,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while "{'CPU': 2.0}: 1+ pending tasks/actors" not in demands(cluster):
            assert time.monotonic() < deadline and run.poll() is None
        cluster.join()
        stdout, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr
        assert json.loads(stdout)["rows"] == IMAGES
        lines = [json.loads(line) for f in trace.iterdir() for line in f.read_text().splitlines()]
        workers = {line["pid"] for line in lines if line["step"] == "predict"}
        assert len(workers) == 2, "the new machine has no worker"
        time.sleep(5)  # until the head has reported it
        assert "pending" not in demands(cluster)
