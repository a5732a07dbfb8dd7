"""A run on threads over drawn shapes, and its dataset."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import vitray
from factories.shards import Picture, pictures, put_tars
from vitray.dataset import Dataset, Leases, open_dataset
from vitray.pipeline.driver import RunState, complete_shards
from vitray.pipeline.local_executor import LocalExecutor
from vitray.pipeline.machines import WorkerShare, local_share
from vitray.schema import Shard

IMAGES = 320
SHARE = local_share(2, has_gpu=False)


def complete(
    dataset: Dataset,
    shards: Sequence[Shard],
    state: RunState | None = None,
    share: WorkerShare = SHARE,
    executor: LocalExecutor | None = None,
) -> RunState:
    """Complete shards with a worker of this process."""
    state = state or RunState()
    executor = executor or LocalExecutor(share)
    with contextlib.closing(executor), Leases(dataset.out, state.run_id) as leases:
        executor.begin(dataset, shards, compiled=share.compiled)
        complete_shards(dataset, shards, executor, leases, state)
    return state


def run(inputs: Path, model: str, out: Path, *more: str) -> str:
    fields = [
        "precision=fp32",
        "engine=torch",
        "batch_size=8",
        "fragment_rows=16",
        "max_error_rate=1",
    ]
    sets = [part for field in fields for part in ("--set", field)]
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "run",
        str(inputs),
        "--model",
        model,
        "--out",
        str(out),
        *sets,
        *more,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def dataset(inputs: Path, shapes_model: str, tmp_path: Path) -> Dataset:
    fields = {
        "precision": "fp32",
        "engine": "torch",
        "batch_size": 8,
        "fragment_rows": 16,
        "max_error_rate": 1,
        "limit": 1,
    }
    vitray.run(
        vitray.Job(source=[str(inputs)], model=shapes_model, out=str(tmp_path / "out"), **fields)
    )
    opened = open_dataset(str(tmp_path / "out"))
    assert opened is not None
    return opened


def write_inputs(folder: Path) -> Path:
    """A folder of three tars with IMAGES images, of which three are broken."""
    items = pictures(IMAGES)
    broken = {7: b"", 50: b"no image", 90: items[90].data[:200]}
    items = [Picture(p.key, broken.get(n, p.data), p.truth, p.suffix) for n, p in enumerate(items)]
    put_tars(str(folder / "in"), items, 3, folder)
    return folder / "in"
