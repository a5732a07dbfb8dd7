"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray
from support.local_runs import IMAGES, run, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("local"))


def test_a_dataset_begun_on_ray_is_finished_by_threads(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    run(inputs, shapes_model, tmp_path / "out", "--address", "local", "--set", "limit=1")
    output = run(inputs, shapes_model, tmp_path / "out")
    assert output.startswith("2 shards committed now"), output
    checked = vitray.validate(str(tmp_path / "out"), content=True)
    assert checked.ok and (checked.rows, checked.errors) == (IMAGES - 3, 3)
    assert run(inputs, shapes_model, tmp_path / "out").startswith("nothing to do")
