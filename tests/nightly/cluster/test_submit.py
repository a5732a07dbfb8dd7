"""`vitray submit` on a real head with its dashboard and a token, on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import vitray
from factories.shards import pictures, put_tars
from support.clusters import Cluster
from support.s3 import free_port
from support.submissions import VITRAY, vitray_on


def test_a_shard_set_aside_there_is_3_here(head: Cluster, job_file: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "broken.tar").write_bytes(b"no tar" * 1000)
    assert vitray_on(head, "submit", job_file).returncode == 3


def test_a_node_that_dies_under_a_submitted_job_costs_no_row(
    head: Cluster, shapes_model: str, tmp_path: Path
) -> None:
    """Three nodes; one is killed when the first shards are committed. The job ends well, and a
    report is made of it.
    """
    for _ in range(2):
        head.join(
            f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"
        )
    images = 2400
    put_tars(f"{tmp_path}/in", pictures(images), 24, tmp_path)
    job = [f"{tmp_path}/in", "--model", shapes_model, "--out", f"{tmp_path}/out"]
    given = vitray_on(
        head, "submit", *job, "--submission-id", "three", "--no-wait", "--set", "fragment_rows=32"
    )
    assert given.returncode == 0, given.stderr
    deadline = time.monotonic() + 180
    while len(list((tmp_path / "out" / "data").glob("*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(head.nodes[-1].pid, signal.SIGKILL)
    at = len(list((tmp_path / "out" / "data").glob("*.parquet")))
    done = vitray_on(head, "status", "three", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    table = vitray.read(str(tmp_path / "out"), columns=["shard", "index", "key"])
    assert sorted(table["key"].to_pylist()) == sorted(picture.key for picture in pictures(images))
    assert vitray.validate(str(tmp_path / "out")).ok
    page = tmp_path / "report.html"
    made = subprocess.run(
        [*VITRAY, "report", f"{tmp_path}/out", "--to", str(page)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.returncode == 0 and "2,400" in page.read_text(), made.stderr
    assert at < 24, "the node died too late to matter"


def test_a_head_without_a_token_is_refused(job_file: Path) -> None:
    cluster = Cluster({**os.environ, "RAY_AUTH_MODE": "disabled"}, dashboard=free_port())
    try:
        cluster.join()
        deadline = time.monotonic() + 60
        while "answers without a token" not in (
            said := vitray_on(cluster, "submit", job_file).stderr
        ):
            assert time.monotonic() < deadline, said
    finally:
        cluster.end()
