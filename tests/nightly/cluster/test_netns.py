"""A cluster of three hosts, each a network namespace of its own, joined by a bridge: what a cut
cable does. Root only.

The namespaces share one disk, as machines share a store: a host that nobody can reach goes on
writing there.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from support.clusters import Cluster
from support.runs import command, lines_of, wait_until_staged

IMAGES = 1536


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
    ),
]


class Hosts:
    """Three namespaces with addresses 10.<n>.0.1 to .3."""

    def __init__(self) -> None:
        self.name = f"v{secrets.token_hex(2)}"
        self.net = f"10.{secrets.randbelow(200) + 20}.0"
        ip("link", "add", self.name, "type", "bridge")
        ip("link", "set", self.name, "up")
        for n in range(3):
            space, outer, inner = self.space(n), f"{self.name}o{n}", f"{self.name}i{n}"
            ip("netns", "add", space)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", outer, "master", self.name, "up")
            ip("link", "set", inner, "netns", space)
            ip("-n", space, "addr", "add", f"{self.net}.{n + 1}/24", "dev", inner)
            ip("-n", space, "link", "set", inner, "up")
            ip("-n", space, "link", "set", "lo", "up")

    def space(self, n: int) -> str:
        return f"{self.name}h{n}"

    def inside(self, n: int) -> list[str]:
        return ["ip", "netns", "exec", self.space(n)]

    def cable(self, n: int, state: str) -> None:
        ip("link", "set", f"{self.name}o{n}", state)

    def remove(self) -> None:
        for n in range(3):
            subprocess.run(["ip", "netns", "del", self.space(n)], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.name], check=False, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize("fault", ["host lost", "cable cut for good", "cable cut and back"])
def test_three_hosts_lose_one(fault: str, hosts: Hosts, shapes_model: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.mkdir()
    put_tars(str(tmp_path / "in"), pictures(IMAGES), 6, tmp_path)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "VITRAY_TRACE": str(trace),
    }
    cluster = Cluster({**os.environ, **environment}, address=f"{hosts.net}.1:6379")
    try:
        for n in range(3):
            cluster.join(f"--node-ip-address={hosts.net}.{n + 1}", inside=hosts.inside(n))
        argv = [
            *hosts.inside(0),
            *command(tmp_path, shapes_model, tmp_path / "out"),
            "--address",
            cluster.address,
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(argv, env=cluster.environment, **pipes)
        wait_until_staged(process, trace, 0.2 * IMAGES)
        happened = time.time()
        if fault == "host lost":
            os.killpg(cluster.nodes[2].pid, signal.SIGKILL)
        else:
            hosts.cable(2, "down")
        if fault == "cable cut and back":
            time.sleep(20)
            hosts.cable(2, "up")
        _, stderr = process.communicate(timeout=500)
        assert process.returncode == 0, stderr
        before = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
        hosts.cable(2, "up")
        time.sleep(10)  # what the host that was cut off still had to write
        after = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    finally:
        cluster.end()
    assert after == before
    assert sorted(vitray.read(str(tmp_path / "out"), columns=["key"])["key"].to_pylist()) == [
        f"{n:05d}" for n in range(IMAGES)
    ]
    assert vitray.validate(str(tmp_path / "out"), content=True).ok
    staged = sorted(
        float(str(line["at"])) - happened for line in lines_of(trace) if line["step"] == "stage"
    )
    gaps = [b - a for a, b in zip([0.0, *staged], staged) if b > 0]
    print(
        f"{fault}: the longest time without a staged fragment was {max(gaps):.1f} s",
        file=sys.stderr,
    )
