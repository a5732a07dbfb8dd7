"""A linear head labels a run in its own pass, with every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factories.small_models import job_for, noise, run
from support.linear_heads import make_head
from support.text_towers import by_label
from vitray.models import identify, open_model, vector_columns
from vitray.schema import ModelOutputs


def test_a_compiled_pass_gives_the_same_scores(vit: str, tmp_path: Path) -> None:
    job = job_for(vit, head=make_head(tmp_path / "head", vit, 2, "mean", True), batch_size=1)
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), "cpu", 1, compiled=True
    )
    np.testing.assert_allclose(
        by_label(model.predict(noise(3))), by_label(run(job, noise(3))), atol=1e-4
    )
