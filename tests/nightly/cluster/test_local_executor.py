"""The executor on threads: the same rows as on Ray, and an end whenever something breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

import vitray
from factories.shards import Picture, pictures, put_tars
from support.local_runs import IMAGES, run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    items = pictures(IMAGES)
    broken = {7: b"", 50: b"no image", 90: items[90].data[:200]}
    items = [Picture(p.key, broken.get(n, p.data), p.truth, p.suffix) for n, p in enumerate(items)]
    put_tars(str(folder / "in"), items, 3, folder)
    return folder / "in"


def test_a_dataset_begun_on_ray_is_finished_by_threads(
    inputs: Path, shapes_model: str, tmp_path: Path
) -> None:
    run(inputs, shapes_model, tmp_path / "out", "--address", "local", "--set", "limit=1")
    output = run(inputs, shapes_model, tmp_path / "out")
    assert output.startswith("2 shards committed now"), output
    checked = vitray.validate(str(tmp_path / "out"), content=True)
    assert checked.ok and (checked.rows, checked.errors) == (IMAGES - 3, 3)
    assert run(inputs, shapes_model, tmp_path / "out").startswith("0 shards committed now")
