"""Exports of the shapes model, and images that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from factories.small_models import job_for, run
from vitray.job import Embedding, Job
from vitray.model_export.export import ExportedModel, export_model
from vitray.models import Predictions
from vitray.operations import demo_model

FLOATS = ("onnx", "openvino", "torch-export")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 240 drawn shapes, class by class, as people's folders are."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(7)
    for kind, name in enumerate(demo_model.NAMES):
        (folder / name).mkdir()
        for n in range(40):
            demo_model.draw(kind, rng).save(folder / name / f"{n:03d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    rng = np.random.default_rng(11)
    return demo_model.pixels_of(
        [demo_model.draw(n % len(demo_model.NAMES), rng) for n in range(600)]
    )


def export_job(model: str, photos: str, **more: object) -> Job:
    return Job(source=photos, out="o", model=model, **more)


def predictions(
    model: str, embeddings: list[Embedding] | None = None, **more: object
) -> Predictions:
    return run(
        job_for(model, engine="auto", top_k=6, embeddings=embeddings or [Embedding()], **more),
        UNSEEN[0],
    )


UNSEEN: list[np.ndarray] = []


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, shapes_model: str, photos: str
) -> tuple[str, ExportedModel]:
    """An int8 ONNX export with two embeddings."""
    into = str(tmp_path_factory.mktemp("small") / "x")
    wanted = [Embedding(), Embedding(layer=2, pool="mean")]
    return into, export_model(
        export_job(shapes_model, photos, embeddings=wanted), "onnx", "int8", into
    )
