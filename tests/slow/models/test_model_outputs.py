"""Scores equal those of transformers' pipeline, for every kind of head and engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from factories.small_models import job_for, make_checkpoint, noise, run
from support.model_heads import IMAGES, ONE, VALUES, require_pipeline
from vitray.errors import ModelError
from vitray.job import Embedding, Job
from vitray.model_export.export import export_model
from vitray.models import identify
from vitray.models.exported import seal


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("head", [ONE, VALUES], ids=["one", "three-regression"])
def test_other_engines_give_the_scores_of_the_pipeline(
    tmp_path: Path, head: dict[str, object], engine: str
) -> None:
    model, pixels = make_checkpoint(tmp_path, "vit", True, **head), noise(IMAGES)
    job = job_for(model, engine=engine)
    spec = identify(job)
    assert spec.engine == engine
    require_pipeline(run(job, pixels, spec), spec, model, pixels)


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("head", [ONE, VALUES], ids=["one", "regression"])
def test_an_export_gives_the_scores_of_its_checkpoint(
    tmp_path: Path, to: str, head: dict[str, object]
) -> None:
    model, pixels = make_checkpoint(tmp_path / "m", "vit", True, **head), noise(IMAGES)
    into = exported(tmp_path, model, to)
    job = job_for(into, engine="auto")
    spec, original = identify(job), identify(job_for(model))
    assert (spec.engine, spec.labels, spec.score_function) == (
        to,
        original.labels,
        original.score_function,
    )
    require_pipeline(run(job, pixels, spec), spec, model, pixels)


@pytest.mark.parametrize(
    ("head", "needed"), [(ONE, "a sigmoid"), (VALUES, "raw values")], ids=["one", "regression"]
)
def test_an_export_whose_graph_has_the_old_softmax_is_refused(
    tmp_path: Path, head: dict[str, object], needed: str
) -> None:
    into = exported(tmp_path, make_checkpoint(tmp_path / "m", "vit", True, **head), "onnx")
    file = Path(into, "vitray_export.json")
    file.write_text(
        json.dumps(seal({**json.loads(file.read_text()), "multi_label": False}))
    )  # as it was written then
    with pytest.raises(
        ModelError, match=f"a softmax where transformers gives {needed}. Export m again"
    ):
        identify(job_for(into, engine="auto"))
    assert (
        identify(job_for(into, False, [Embedding()], engine="auto")).labels == ()
    )  # embeddings are what they were


def exported(folder: Path, model: str, to: str) -> str:
    (folder / "photos").mkdir()
    for n, image in enumerate(noise(20, 40)):
        Image.fromarray(image).save(folder / "photos" / f"{n}.png")
    job = Job(source=str(folder / "photos"), out="o", model=model, embeddings=[Embedding()])
    return export_model(job, to, "", str(folder / "x")).into
