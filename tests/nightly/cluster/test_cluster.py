"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from support.clusters import Cluster, cluster_of
from support.runs import command, images_by_step, lines_of, wait_until_staged


def test_a_cluster_that_asks_for_no_token_is_joined_where_that_is_asked_for(
    on_open_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    joined = on_open_cluster("--allow-open-cluster")
    assert joined.returncode == 0, joined.stderr
    assert sorted(vitray.read(str(tmp_path / "out"))["key"].to_pylist()) == [
        f"{n:05d}" for n in range(32)
    ]


def begun(cluster: Cluster, argv: list[str], trace: Path, images: float) -> subprocess.Popen[str]:
    """A run on the cluster that has staged so many images."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*argv, "--address", cluster.address], env=cluster.environment, **pipes
    )
    wait_until_staged(process, trace, images)
    return process


def test_a_lost_node_costs_no_row_and_a_new_one_is_used(shapes_model: str, tmp_path: Path) -> None:
    """SIGKILL of all processes of a node in the middle of a run; another joins."""
    images, trace = 1536, tmp_path / "trace"
    put_tars(str(tmp_path / "in"), pictures(images), 6, tmp_path)
    trace.mkdir()
    with cluster_of(
        2, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), VITRAY_TRACE=str(trace)
    ) as cluster:
        process = begun(
            cluster, command(tmp_path, shapes_model, tmp_path / "out"), trace, 0.2 * images
        )
        os.killpg(cluster.nodes[1].pid, signal.SIGKILL)
        lost, before = time.time(), images_by_step(trace)["stage"]
        assert before < 0.9 * images
        cluster.join()
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    table = vitray.read(str(tmp_path / "out"), columns=["key"])
    assert sorted(table["key"].to_pylist()) == [f"{n:05d}" for n in range(images)]
    assert vitray.validate(str(tmp_path / "out"), content=True).ok
    moved = min(
        at
        for line in lines_of(trace)
        if line["step"] == "stage" and (at := float(str(line["at"]))) > lost + 0.5
    )
    print(f"a node lost at {before / images:.0%}: staged again after {moved - lost:.1f} s")


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"
)
def test_a_node_that_joins_without_the_shared_disk_loses_and_doubles_nothing(
    shapes_model: str, tmp_path: Path
) -> None:
    """Its mounts are its own: an empty disk lies where the others have source and out. The run ends
    and says so; without it, it completes.
    """
    images, trace, disk = 1536, tmp_path / "trace", tmp_path / "disk"
    put_tars(str(disk / "in"), pictures(images), 12, tmp_path)
    trace.mkdir()
    with cluster_of(
        1, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), VITRAY_TRACE=str(trace)
    ) as cluster:
        argv = command(disk, shapes_model, disk / "out")
        process = begun(cluster, argv, trace, 0.1 * images)
        cluster.join(
            inside=(
                "unshare",
                "--mount",
                "sh",
                "-c",
                f'mount -t tmpfs none {disk} && exec "$0" "$@"',
            )
        )
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 1, stderr
        assert f"{disk}/out/_vitray/dataset.json cannot be seen from" in stderr.splitlines()[-1], (
            stderr
        )
        os.killpg(cluster.nodes[1].pid, signal.SIGTERM)  # so that it says goodbye
        cluster.nodes.pop().wait(60)
        done = subprocess.run(
            [*argv, "--address", cluster.address],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    table = vitray.read(str(disk / "out"), columns=["key"])
    assert sorted(table["key"].to_pylist()) == [f"{n:05d}" for n in range(images)]
    assert vitray.validate(str(disk / "out"), content=True).ok
