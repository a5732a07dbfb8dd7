"""What goes wrong on a cluster: workers killed or stopped, models that never open, no memory, a
small object store. Every id is compared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitray
from factories.shards import pictures, put_tars
from factories.small_models import make_checkpoint
from support.clusters import Cluster
from support.runs import command, images_by_step, lines_of, start, wait_until_staged

pytestmark = pytest.mark.timeout(600)

IMAGES = 1536
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster-faults")
    put_tars(str(folder / "in"), pictures(IMAGES), 6, folder)
    return folder


def require_whole(out: Path) -> None:
    table = vitray.read(str(out), columns=["key"])
    assert sorted(table["key"].to_pylist()) == [f"{n:05d}" for n in range(IMAGES)]
    checked = vitray.validate(str(out), content=True)
    assert checked.ok and checked.errors == 0, str(checked)


@contextlib.contextmanager
def one_node(
    *options: str, store_bytes: int = 300_000_000, **environment: str
) -> Iterator[Cluster]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    cluster = Cluster({**os.environ, **token, **environment}, store_bytes=store_bytes)
    try:
        cluster.join(*options)
        yield cluster
    finally:
        cluster.end()


def last_pid(trace: Path, step: str) -> int | None:
    done = [line for line in lines_of(trace) if line["step"] == step]
    return int(str(max(done, key=lambda line: float(str(line["at"])))["pid"])) if done else None


def test_workers_and_actors_killed_every_few_seconds(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    """The process of each stage in turn, every 3 s, eight times: its shards are given to the worker
    that follows it.
    """
    trace = tmp_path / "trace"
    run = start(command(inputs, shapes_model, tmp_path / "out", "--address", "local"), trace)
    wait_until_staged(run, trace, 1)
    killed = 0
    for step in ("decode", "predict", "stage", "read") * 2:
        time.sleep(3)
        pid = last_pid(trace, step)
        if run.poll() is None and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stderr
    require_whole(tmp_path / "out")
    assert killed >= 3
    print(
        f"{killed} processes killed; done again: "
        f"{ {s: n - IMAGES for s, n in images_by_step(trace).items()} }"
    )


def test_a_stopped_worker_is_waited_for(inputs: Path, shapes_model: str, tmp_path: Path) -> None:
    """SIGSTOP for 15 s, as a machine that swaps or a hypervisor that pauses."""
    trace = tmp_path / "trace"
    run = start(command(inputs, shapes_model, tmp_path / "out", "--address", "local"), trace)
    wait_until_staged(run, trace, 0.2 * IMAGES)
    pids = [pid for step in ("decode", "predict") if (pid := last_pid(trace, step)) is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(15)
    assert run.poll() is None
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    _, stderr = run.communicate(timeout=200)
    assert run.returncode == 0, stderr
    require_whole(tmp_path / "out")


def test_an_actor_that_dies_whenever_it_opens_the_model_is_one_error(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    argv = command(inputs, shapes_model, tmp_path / "out", "--address", "local")
    started = time.monotonic()
    dying = start(argv, tmp_path / "trace", VITRAY_CRASH_AT="model-loaded")
    _, stderr = dying.communicate(timeout=500)
    print(f"gave up after {time.monotonic() - started:.0f} s")
    assert dying.returncode == 1 and "the run fails again and again" in stderr.splitlines()[-1], (
        stderr
    )
    assert subprocess.run(argv, capture_output=True, timeout=200).returncode == 0
    require_whole(tmp_path / "out")


@pytest.fixture(scope="module")
def large_pixels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of 224x224: the pixels of all images are 231 MB."""
    return make_checkpoint(tmp_path_factory.mktemp("large"), "vit", headed=True, side=224)


BLOCKS = ("--set", "fragment_rows=128")  # 19 MB each: a few fill a store of 80 MB


def test_an_object_store_of_80_mb_is_never_full(
    inputs: Path, large_pixels: str, tmp_path: Path
) -> None:
    """Pixels stay in the worker: nothing is spilled, so that a full disk would not matter."""
    spilled = tmp_path / "spilled"
    spilled.mkdir()
    with one_node(f"--object-spilling-directory={spilled}", store_bytes=80_000_000) as cluster:
        argv = [
            *command(inputs, large_pixels, tmp_path / "out", *BLOCKS),
            "--address",
            cluster.address,
        ]
        run = subprocess.Popen(argv, env=cluster.environment, **PIPES)
        most = 0
        while run.poll() is None:
            most = max(
                most, sum(path.stat().st_size for path in spilled.rglob("*") if path.is_file())
            )
            time.sleep(0.1)
        _, stderr = run.communicate(timeout=30)
    print(f"spilled: {most} bytes")
    assert run.returncode == 0, stderr
    require_whole(tmp_path / "out")
    assert most == 0


def test_a_machine_whose_memory_is_always_full_is_one_error(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    """Ray's memory monitor kills whatever works. With memory again, the same command ends whole."""
    argv = command(inputs, shapes_model, tmp_path / "out", "--address", "local")
    started = time.monotonic()
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    run = start(argv, tmp_path / "trace", **limits)
    _, stderr = run.communicate(timeout=500)
    print(f"gave up after {time.monotonic() - started:.0f} s: {stderr.splitlines()[-1][:200]}")
    assert run.returncode == 1 and stderr.splitlines()[-1].startswith("ClusterError"), stderr
    assert subprocess.run(argv, capture_output=True, timeout=200).returncode == 0
    require_whole(tmp_path / "out")
