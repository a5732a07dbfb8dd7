"""Ray clusters on this machine: a head and nodes with a token, started and lost by a test."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars
from support.s3 import free_port


def answers(argv: list[str], environment: dict[str, str]) -> bool:
    """Whether a command ends well within 20 s; `ray status` waits for ever on a head that is just
    coming up.
    """
    try:
        return (
            subprocess.run(argv, env=environment, capture_output=True, timeout=20).returncode == 0
        )
    except subprocess.TimeoutExpired:
        return False


@dataclass
class Cluster:
    """Nodes of 2 CPUs each, every one a process group of its own, never ended by name."""

    environment: dict[str, str]
    address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    store_bytes: int = 300_000_000
    dashboard: int | None = None  # its port
    folder: str = field(
        default_factory=lambda: f"/tmp/vr-{secrets.token_hex(3)}"
    )  # short: Ray's sockets live in it

    def join(self, *more: str, inside: Sequence[str] = ()) -> None:
        """One more node, with more options, started by another command; the first is the head."""
        ray = str(Path(sys.executable).with_name("ray"))
        first = ["--head", f"--port={self.address.split(':')[1]}", f"--temp-dir={self.folder}"]
        first += (
            ["--include-dashboard=false"]
            if self.dashboard is None
            else [f"--dashboard-port={self.dashboard}"]
        )
        argv = [
            *inside,
            ray,
            "start",
            *([f"--address={self.address}"] if self.nodes else first),
            *more,
        ]
        argv += [
            "--num-cpus=2",
            f"--object-store-memory={self.store_bytes}",
            "--block",
            "--disable-usage-stats",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.nodes.append(
            subprocess.Popen(argv, env=self.environment, start_new_session=True, **quiet)
        )
        deadline = time.monotonic() + 120
        while not answers([*inside, ray, "status", f"--address={self.address}"], self.environment):
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.5)

    def end(self) -> None:
        for process in reversed(self.nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(6)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def cluster_of(nodes: int, **environment: str) -> Iterator[Cluster]:
    cluster = Cluster({**os.environ, **environment})
    try:
        for _ in range(nodes):
            cluster.join()
        yield cluster
    finally:
        cluster.end()


RUN = [sys.executable, "-m", "vitray", "run", "--set", "engine=torch"]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with cluster_of(2, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16)) as found:
        yield found


@pytest.fixture
def on_open_cluster(
    shapes_model: str, tmp_path: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A run of 32 images, with more options, on a cluster that asks for no token."""
    put_tars(str(tmp_path / "in"), pictures(32), 1, tmp_path)
    with cluster_of(1, RAY_AUTH_MODE="disabled") as cluster:
        argv = [
            *RUN,
            str(tmp_path / "in"),
            "--model",
            shapes_model,
            "--out",
            str(tmp_path / "out"),
            "--address",
            cluster.address,
        ]
        yield lambda *more: subprocess.run(
            [*argv, *more], env=cluster.environment, capture_output=True, text=True, timeout=200
        )
