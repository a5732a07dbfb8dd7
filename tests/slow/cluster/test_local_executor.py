"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vitray
from support.local_runs import IMAGES, run, write_inputs
from vitray.dataset import Dataset
from vitray.errors import ClusterError
from vitray.pipeline import cluster, ray_executor
from vitray.pipeline.events import Event, ShardCommitted, WorkerReady
from vitray.pipeline.ray_executor import RayExecutor
from vitray.sources import list_shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("local"))


def test_on_a_full_cluster_the_executor_waits_for_a_machine(
    ray: None, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray as rays

    class Takes:
        def answer(self) -> bool:
            return True

    taker = rays.remote(Takes).options(num_cpus=rays.cluster_resources()["CPU"]).remote()
    assert rays.get(taker.answer.remote(), timeout=60)
    monkeypatch.setattr(cluster, "NOTICE_S", 0.5)
    monkeypatch.setattr(ray_executor, "PLACEMENT_TIMEOUT_S", 1.8)
    executor = RayExecutor("cpu")
    with pytest.raises(
        ClusterError,
        match=r"^reading the model on a machine with room for it did not finish in 1\.8 s\.",
    ):
        executor.identify(dataset.job, 10, lambda: None)
    words = [record.message for record in caplog.records if record.name == cluster.__name__]
    assert len(words) in (2, 3)  # beside other state a wait may take longer than it was given
    assert set(words) == {
        "waiting for cluster resources: reading the model on a machine with room for it"
    }
    shards = list_shards(dataset.job.model_copy(update={"limit": None}), []).shards[1:2]
    try:
        executor.begin(dataset, shards, compiled=False)
        deadline = time.monotonic() + 60
        while not executor.is_waiting_for_machine():
            assert time.monotonic() < deadline and executor.events(0.2) == []
        assert executor.events(3.0) == [] and executor.is_waiting_for_machine()
        rays.kill(taker)
        arrived = list[Event]()
        deadline = time.monotonic() + 60
        while not any(isinstance(event, ShardCommitted) for event in arrived):
            assert time.monotonic() < deadline, arrived
            new = executor.events(1.0)
            assert not (new and executor.is_waiting_for_machine())
            for event in new:
                if isinstance(event, WorkerReady):
                    executor.give(event.worker, shards)
            arrived += new
        assert isinstance(arrived[0], WorkerReady)
    finally:
        executor.close()


def test_threads_and_ray_write_the_same_rows(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    run(inputs, shapes_model, tmp_path / "threads")
    run(inputs, shapes_model, tmp_path / "ray", "--address", "local")
    by_threads, by_ray = (
        vitray.read(str(tmp_path / name)).sort_by("key") for name in ("threads", "ray")
    )
    assert by_threads.num_rows == IMAGES - 3
    exact_columns = [
        name for name in by_threads.column_names if name not in ("embedding", "score", "top_scores")
    ]
    assert by_threads.select(exact_columns).equals(by_ray.select(exact_columns))
    vectors = [np.stack(table["embedding"].to_numpy()) for table in (by_threads, by_ray)]
    np.testing.assert_allclose(*vectors, atol=1e-5)
    errors = [
        [pq.read_table(path) for path in sorted((tmp_path / name / "_errors").iterdir())]
        for name in ("threads", "ray")
    ]
    assert errors[0] == errors[1] and sum(table.num_rows for table in errors[0]) == 3
