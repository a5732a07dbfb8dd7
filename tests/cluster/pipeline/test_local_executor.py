"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vitray
from support.local_runs import IMAGES, run, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("local"))


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
