"""Two runs of one job at the same time, each with its partition, in threads of this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import vitray
from factories.shards import pictures, put_tars
from vitray.pipeline import Partition, Result, run

IMAGES = 240
TARS = 12


def test_partitions_compute_each_image_once(shapes_model: str, tmp_path: Path) -> None:
    put_tars(f"{tmp_path}/in", pictures(IMAGES), TARS, tmp_path)
    fields = {"device": "cpu", "engine": "torch", "batch_size": 8, "fragment_rows": 16}
    job = vitray.Job(source=f"{tmp_path}/in", model=shapes_model, out=f"{tmp_path}/out", **fields)
    vitray.run(job.model_copy(update={"limit": 1}))  # so that the dataset exists
    first = vitray.read(job.out).num_rows

    def part(index: int) -> Result:
        return run(job, partition=Partition(index, 2))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(part, range(2)))
    assert first + sum(result.images for result in results) == IMAGES
    assert all(result.committed > 0 for result in results)
    keys = vitray.read(job.out)["key"].to_pylist()
    assert sorted(keys) == [f"{n:05d}" for n in range(IMAGES)]
    assert (tmp_path / "out" / "_SUCCESS.json").exists()
