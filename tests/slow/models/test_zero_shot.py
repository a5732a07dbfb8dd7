"""Labels that a text tower reads: equal to transformers' own zero-shot pipeline, on every engine,
frozen with the dataset.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factories.small_models import job_for, noise, run
from support.text_towers import IMAGES, LABELS, PROMPTS, by_label
from vitray.job import Embedding, Job
from vitray.model_export.export import export_model


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_other_engines_give_the_same_scores(towers: dict[str, str], stem: str, engine: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    wanted = [Embedding(pool="mean")]
    torch_says = run(job_for(towers[stem], LABELS, wanted), noise(IMAGES))
    found = run(job_for(towers[stem], LABELS, wanted, engine=engine), noise(IMAGES))
    np.testing.assert_allclose(by_label(found), by_label(torch_says), atol=1e-4)
    np.testing.assert_allclose(
        found.vectors["embedding"], torch_says.vectors["embedding"], atol=1e-4
    )


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_an_export_has_the_words_in_its_graph(
    towers: dict[str, str], tmp_path: Path, stem: str
) -> None:
    for n, image in enumerate(noise(20)):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    fields = {
        "labels": LABELS,
        "prompts": PROMPTS,
        "embeddings": [Embedding(pool="mean")],
        "precision": "fp32",
        "device": "cpu",
    }
    job = Job(source=str(tmp_path), out="o", model=towers[stem], **fields)
    made = export_model(job, "onnx", "", str(tmp_path / "x"))
    assert (
        made.comparison.share() == 1.0
        and made.comparison.error is not None
        and made.comparison.error < 1e-3
    )
    pixels = noise(IMAGES, seed=1)
    found = run(job_for(str(tmp_path / "x"), top_k=9, engine="auto"), pixels)
    np.testing.assert_allclose(
        by_label(found),
        by_label(run(job_for(towers[stem], LABELS, prompts=PROMPTS, top_k=9), pixels)),
        atol=1e-4,
    )
