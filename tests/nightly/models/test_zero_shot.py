"""Labels that a text tower reads: equal to transformers' own zero-shot pipeline, on every engine,
frozen with the dataset.
"""

from __future__ import annotations

import numpy as np
import pytest

from factories.small_models import job_for, noise, run
from support.text_towers import LABELS, by_label
from vitray.models import identify, open_model, vector_columns
from vitray.schema import ModelOutputs


@pytest.mark.parametrize("stem", ["CLIP", "Siglip"])
def test_a_compiled_pass_gives_the_same_scores(towers: dict[str, str], stem: str) -> None:
    job = job_for(towers[stem], LABELS, batch_size=1)
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), "cpu", 1, compiled=True
    )
    assert len(model.compiled) == 1
    np.testing.assert_allclose(
        by_label(model.predict(noise(3))), by_label(run(job, noise(3))), atol=1e-4
    )
