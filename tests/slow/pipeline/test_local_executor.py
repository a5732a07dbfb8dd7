"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from support.local_runs import IMAGES, complete, write_inputs
from vitray.dataset import Dataset
from vitray.pipeline.machines import local_share
from vitray.sources import list_shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("local"))


def test_a_run_from_python_leaves_torch_its_threads(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    code = f"""
import torch, vitray
torch.set_num_threads(2)
job = vitray.Job(source={str(inputs)!r}, model={shapes_model!r}, out={str(tmp_path / "out")!r}, engine="torch", max_error_rate=1)
result = vitray.run(job)
print(result.rows, torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.stdout.split() == [str(IMAGES - 3), "2"], done.stderr


def test_more_threads_than_shards_and_a_compiled_model_change_nothing(
    dataset: Dataset, tmp_path: Path
) -> None:
    """Written into a dataset of its own, with four times the threads, and torch.compile."""
    shards = list_shards(dataset.job, []).shards
    share = replace(local_share(8, has_gpu=False), readers=6, writers=5, compiled=True)
    other = replace(dataset, out=str(tmp_path / "other"))
    state = complete(other, shards, share=share)
    assert (
        sorted(state.commits) == sorted(shard.id for shard in shards)
        and state.progress.images == IMAGES
    )
    (path,) = (tmp_path / "out" / "data").iterdir()
    own = pq.read_table(tmp_path / "other" / "data" / path.name)
    reference = pq.read_table(path)
    assert own["key"].equals(reference["key"]) and own["label"].equals(reference["label"])
    np.testing.assert_allclose(
        *(np.stack(t["embedding"].to_numpy()) for t in (own, reference)), atol=1e-4
    )
