"""A Ray head with its dashboard, and commands that submit jobs to it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars
from support.clusters import Cluster
from support.s3 import free_port

VITRAY = [sys.executable, "-m", "vitray"]
IMAGES = 120
METRICS = free_port()


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "CANARY": f"canary-{secrets.token_hex(8)}",
    }
    path = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }  # where the cluster's machines have vitray
    # idle workers beyond a node's CPUs are killed, and started again: minutes on two cores
    often = {"RAY_metrics_report_interval_ms": "500", "RAY_num_workers_soft_limit": "64"}
    cluster = Cluster({**os.environ, **token, **path, **often}, dashboard=free_port())
    try:
        # ports of its own: the agent's default is taken where another Ray runs
        cluster.join(
            f"--metrics-export-port={METRICS}", f"--dashboard-agent-listen-port={free_port()}"
        )
        deadline = time.monotonic() + 60  # the dashboard comes after the head
        while "nobody" not in vitray_on(cluster, "status", "nobody").stderr:
            assert time.monotonic() < deadline
        yield cluster
    finally:
        cluster.end()


def url(head: Cluster) -> str:
    return f"http://127.0.0.1:{head.dashboard}"


def vitray_on(head: Cluster, *argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*VITRAY, *map(str, argv), "--address", url(head)]
    return subprocess.run(
        command, env=head.environment, capture_output=True, text=True, timeout=240, **options
    )


@pytest.fixture
def job_file(shapes_model: str, tmp_path: Path) -> Path:
    put_tars(f"{tmp_path}/in", pictures(IMAGES), 3, tmp_path)
    path = tmp_path / "job.yaml"
    fields = {
        "source": f"{tmp_path}/in/*.tar",
        "model": shapes_model,
        "out": f"{tmp_path}/out",
        "engine": "torch",
    }
    path.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return path
