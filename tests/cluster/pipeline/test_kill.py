"""kill -9 of the driver, or of a worker in any of its stages, in the middle of a run; then the same
command again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import vitray
from support.runs import (
    FRAGMENT,
    IMAGES,
    command,
    images_by_step,
    lines_of,
    start,
    wait_until_staged,
)
from vitray.dataset import open_dataset
from vitray.pipeline.cluster import own_cpus
from vitray.pipeline.machines import WorkerShare, local_share
from vitray.pipeline.worker import PREDICTORS

ROUNDS = [pytest.param(n, marks=[pytest.mark.nightly] if n >= 1 else []) for n in range(25)]


def kill_in_the_middle(
    process: subprocess.Popen[str], trace: Path, victim: str, share: float
) -> None:
    """SIGKILL once `share` of the images are staged. A kill outside 10 to 90% does not count: the
    test fails.
    """
    wait_until_staged(process, trace, share * IMAGES)
    if victim.startswith("driver"):
        os.kill(process.pid, signal.SIGKILL)
    else:
        last = max(
            (line for line in lines_of(trace) if line["step"] == victim),
            key=lambda line: float(str(line["at"])),
        )
        os.kill(int(str(last["pid"])), signal.SIGKILL)
    staged = images_by_step(trace)["stage"] / IMAGES
    assert 0.1 <= staged <= 0.9, f"the kill came at {staged:.0%}"


def most_redone(share: WorkerShare) -> dict[str, int]:
    """How many images each stage computes again after a kill, at most: those in flight behind it.

    Blocks of this test have one fragment each. What was written stays.
    """
    unwritten = PREDICTORS + share.queue_blocks + share.writers
    undone = {"decode": share.decoders + share.queue_blocks + unwritten, "predict": unwritten}
    return {step: FRAGMENT * fragments for step, fragments in undone.items()} | {"stage": 0}


def staged_bytes(out: Path) -> dict[str, bytes]:
    found = {}
    for path in (out / "_vitray" / "staging").glob("*/*.arrow"):
        with contextlib.suppress(FileNotFoundError):  # its shard was committed just now
            found[str(path)] = path.read_bytes()
    return found


@pytest.mark.parametrize(
    "victim",
    [
        "driver",
        *(pytest.param(v, marks=pytest.mark.nightly) for v in ("driver on ray", "decode")),
        "predict",
    ],
)
@pytest.mark.parametrize("round_", ROUNDS)
def test_killed_process_leaves_no_lost_or_doubled_row(
    inputs: Path, shapes_model: str, tmp_path: Path, victim: str, round_: int
) -> None:
    share = random.Random(f"{victim}{round_}").uniform(0.1, 0.8)
    out, trace = tmp_path / "out", tmp_path / "trace"
    on_ray = victim != "driver"  # else all is in one process
    argv = command(inputs, shapes_model, out, *(["--address", "local"] if on_ray else []))
    first = start(argv, trace)
    kill_in_the_middle(first, trace, victim, share)
    if victim.startswith("driver"):
        first.wait(30)
        time.sleep(3)  # its workers notice and go
        kept = staged_bytes(out)
        done = sum(
            pq.read_metadata(path).num_rows for path in (out / "data").glob("*.parquet")
        )  # had left the staging
        assert len(kept) * FRAGMENT + done >= 0.05 * IMAGES
        second = start(argv, trace)
        while second.poll() is None:  # a fragment keeps its bytes until its shard is committed
            now = staged_bytes(out)
            assert all(now.get(path, data) == data for path, data in kept.items())
            time.sleep(0.2)
    else:
        second = first
    _, stderr = second.communicate(timeout=240)
    assert second.returncode == 0, stderr
    if on_ray:  # its logs stay only after a failure
        assert not list(Path("/tmp/ray").glob(f"session_*_{second.pid}"))
    again = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    assert again.stdout.startswith("nothing to do"), again.stdout
    table = vitray.read(str(out), columns=["key", "shard", "index"])
    assert sorted(table["key"].to_pylist()) == [f"{n:05d}" for n in range(IMAGES)]
    assert len(set(zip(table["shard"].to_pylist(), table["index"].to_pylist()))) == IMAGES
    assert vitray.validate(str(out), content=True).ok
    counts, most = images_by_step(trace), most_redone(local_share(own_cpus(), has_gpu=False))
    redone = {step: counts[step] - IMAGES for step in most}
    assert all(redone[step] <= most[step] for step in most), (redone, most)
    dataset = open_dataset(str(out))
    assert dataset is not None and dataset.fragment_rows == FRAGMENT
    print(f"{victim} killed at {share:.0%}: done again {redone}, at most {most}")
