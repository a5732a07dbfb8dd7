"""A linear head labels a run in its own pass, with every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from factories.small_models import job_for, noise, run
from support.linear_heads import IMAGES, make_head
from support.text_towers import by_label


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_other_engines_give_the_same_scores(vit: str, tmp_path: Path, engine: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    url = make_head(tmp_path / "head", vit, 2, "mean", True)
    exact = by_label(run(job_for(vit, head=url), noise(IMAGES)))
    np.testing.assert_allclose(
        by_label(run(job_for(vit, head=url, engine=engine), noise(IMAGES))), exact, atol=1e-4
    )
