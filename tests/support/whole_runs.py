"""Drawn shapes, jobs over them, and the rows of their datasets."""

from __future__ import annotations

import pytest

import vitray
from factories.shards import Picture, pictures
from vitray.job import make_job
from vitray.storage import store_for


@pytest.fixture(scope="module")
def items() -> list[Picture]:
    return pictures(1040)


def listing(out: str) -> dict[str, str]:
    return {info.url: info.version for info in store_for(out).find(out)}


def shape_job(source: str, model: str, out: str, **fields: object) -> vitray.Job:
    return make_job(
        {
            "source": source,
            "model": model,
            "out": out,
            "precision": "fp32",
            "engine": "torch",
            **fields,
        }
    )
