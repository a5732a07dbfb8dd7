"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shards import pictures, put_tars

import vitray
from vitray.errors import ClusterError
from vitray.pipeline.cluster import share_out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(argv: list[str], environment: dict[str, str]) -> bool:
    """Whether a command ends well within 20 s; `ray status` waits for ever on a head that is just coming up."""
    try:
        return subprocess.run(argv, env=environment, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(address, environment) of two nodes of 2 CPUs each; ended by their process groups, never by name."""
    folder = Path(f"/tmp/vr-{secrets.token_hex(3)}")  # short: Ray's sockets live in it
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    address, ray = f"127.0.0.1:{free_port()}", str(Path(sys.executable).with_name("ray"))
    common = ["--num-cpus=2", "--object-store-memory=300000000", "--block", "--disable-usage-stats"]
    head = [
        ray,
        "start",
        "--head",
        f"--port={address.split(':')[1]}",
        "--include-dashboard=false",
        f"--temp-dir={folder}",
        *common,
    ]
    worker = [ray, "start", f"--address={address}", *common]
    running = []
    try:
        for argv in (head, worker):
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running.append(subprocess.Popen(argv, env=environment, start_new_session=True, **quiet))
            deadline = time.monotonic() + 120
            while not answers([ray, "status", f"--address={address}"], environment):
                assert time.monotonic() < deadline, "the node did not start"
                time.sleep(0.5)
        yield address, environment
    finally:
        for process in reversed(running):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(6)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.ray
def test_a_run_joins_a_cluster_of_two_nodes(cluster: tuple[str, dict[str, str]], shapes_model: str, tmp_path: Path) -> None:
    address, environment = cluster
    put_tars(str(tmp_path / "in"), pictures(96), 3, tmp_path)
    argv = [sys.executable, "-m", "vitray", "run", str(tmp_path / "in"), "--model", shapes_model, "--out", str(tmp_path / "out")]
    first = subprocess.run([*argv, "--address", address], env=environment, capture_output=True, text=True, timeout=200)
    assert first.returncode == 0, first.stderr
    assert sorted(vitray.read(str(tmp_path / "out"))["key"].to_pylist()) == [f"{n:05d}" for n in range(96)]
    assert not list((tmp_path / "out" / "_vitray").glob("probe-*"))  # the nonce that all nodes had to see is gone
    wrong = {**environment, "RAY_AUTH_TOKEN": "wrong"}
    again = subprocess.run(
        [*argv[:-1], str(tmp_path / "out-2"), "--address", address], env=wrong, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 1 and again.stderr.startswith("ClusterError: Ray at"), again.stderr


def test_shares_leave_a_cpu_beside_the_actors_and_refuse_what_cannot_move() -> None:
    small = share_out([{"CPU": 2}], "auto")
    assert (small.actors, small.actor_cpus, small.decoder_cpus, small.threads) == (1, 1, 0.5, 2)
    gpus = share_out([{"CPU": 16, "GPU": 2}, {"CPU": 8}], "auto")
    assert (gpus.actors, gpus.actor_cpus, gpus.actor_gpus, gpus.decoder_cpus) == (2, 1, 1, 1)
    assert share_out([{"CPU": 16, "GPU": 2}], "cpu").actor_gpus == 0
    for nodes, text in (
        ([{"CPU": 1}], "needs 2"),
        ([{"CPU": 2, "GPU": 2}], "one a GPU"),
        ([{"CPU": 1}, {"CPU": 1}], "no machine"),
    ):
        with pytest.raises(ClusterError, match=text):
            share_out(nodes, "auto")
