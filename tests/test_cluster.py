"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import free_port
from shards import pictures, put_tars
from test_kill import command, images_by_step, lines_of, wait_until_staged

import vitray
from vitray.errors import ClusterError
from vitray.pipeline.cluster import share_out


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


@pytest.mark.ray
def test_a_run_joins_a_cluster_of_two_nodes(
    cluster: Cluster, shapes_model: str, tmp_path: Path
) -> None:
    address, environment = cluster.address, cluster.environment
    put_tars(str(tmp_path / "in"), pictures(96), 3, tmp_path)
    argv = [*RUN, str(tmp_path / "in"), "--model", shapes_model, "--out", str(tmp_path / "out")]
    first = subprocess.run(
        [*argv, "--address", address], env=environment, capture_output=True, text=True, timeout=200
    )
    assert first.returncode == 0, first.stderr
    assert sorted(vitray.read(str(tmp_path / "out"))["key"].to_pylist()) == [
        f"{n:05d}" for n in range(96)
    ]
    assert not list(
        (tmp_path / "out" / "_vitray").glob("probe-*")
    )  # the nonce that all nodes had to see is gone
    wrong = {**environment, "RAY_AUTH_TOKEN": "wrong"}
    again = subprocess.run(
        [*argv[:-1], str(tmp_path / "out-2"), "--address", address],
        env=wrong,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 1 and again.stderr.startswith("ClusterError: Ray at"), again.stderr


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


@pytest.mark.ray
def test_a_cluster_that_asks_for_no_token_is_refused(
    on_open_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    refused = on_open_cluster()
    assert refused.returncode == 1 and "answers without a token" in refused.stderr, refused.stderr
    assert not (tmp_path / "out" / "data").exists()


@pytest.mark.ray
@pytest.mark.nightly
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


@pytest.mark.ray
@pytest.mark.nightly
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


@pytest.mark.ray
@pytest.mark.nightly
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
