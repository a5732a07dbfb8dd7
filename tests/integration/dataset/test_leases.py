"""Leases on a disk, a mock and a real S3 server, and what a claim costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.dataset_parts import stored
from support.s3 import new_bucket
from support.s3_proxy import Proxy
from vitray.dataset import Leases
from vitray.dataset.leases import EXPIRE_S, LOOK_S, Holder, Lease, lease_bytes
from vitray.storage import join, store_for

ANOTHER_MACHINE = Holder("another boot", 1, 1, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


def put(out: str, run: str, shards: str, counter: int) -> None:
    data = lease_bytes(Lease(frozenset(shards), ANOTHER_MACHINE), counter)
    store_for(out).replace(join(out, "_vitray", "leases", f"{run}.json"), data)


def test_runs_share_shards_on_every_store(out: str) -> None:
    clock = Clock()
    with Leases(out, "a", clock=clock) as first, Leases(out, "b", clock=clock) as second:
        assert first.claim("1234", 2) == ["1", "2"]
        assert second.claim("1234", 2) == ["3", "4"]
        first.release("12")
        first.renew()
        clock.pass_s(LOOK_S)
        assert second.claim("1234", 1) == ["1"]
        assert second.has_others
    assert stored(out) == {}


def test_a_lease_expires_on_every_store(out: str) -> None:
    clock = Clock()
    put(out, "other", "1", 1)
    with Leases(out, "z", clock=clock) as own:
        assert own.claim("12", 2) == ["2"]
        clock.pass_s(EXPIRE_S - 1)
        put(out, "other", "1", 2)
        assert own.claim("1", 1) == []
        clock.pass_s(EXPIRE_S)
        assert own.claim("1", 1) == ["1"]
        assert list(stored(out)) == ["_vitray/leases/z.json"]


def test_a_run_alone_pays_a_write_and_a_listing_for_a_claim(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = join(new_bucket(proxy.url, monkeypatch), "out")
    with Leases(out, "a", clock=Clock()) as own:
        proxy.calls.clear()
        assert own.claim("1234", 2) == ["1", "2"]
        own.release("12")
        assert not own.has_others and own.held_by_others() == frozenset()
        assert [call.method for call in proxy.calls] == ["PUT", "GET"]


def test_the_shards_of_a_killed_process_are_free_at_once(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    program = (
        "import os, signal; from vitray.dataset import Leases; "
        f"own = Leases({out!r}, 'a'); own.claim('12', 2); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert list(stored(out)) == ["_vitray/leases/a.json"]
    with Leases(out, "b") as own:
        assert own.claim("12", 2) == ["1", "2"]
    assert stored(out) == {}
