"""Tars of drawn shapes that `vitray bench` reads."""

from __future__ import annotations

import pytest

from factories.shards import pictures, put_tars


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bench")
    put_tars(str(folder / "in"), pictures(96), 2, folder)
    return str(folder / "in")
