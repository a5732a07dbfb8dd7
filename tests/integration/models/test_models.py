"""Models: predictions equal a plain transformers loop, whatever the batch, the pool and the
precision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from factories.small_models import (
    CLASSES,
    PREFIX,
    STEM,
    every_vector,
    job_for,
    make_checkpoint,
    noise,
    plain_loop,
    require_plain,
    run,
)
from vitray.job import Embedding
from vitray.models import identify
from vitray.operations import demo_model

pytestmark = pytest.mark.usefixtures("two_threads")

CASES = [(name, headed, 32) for name in STEM for headed in (True, False)] + [
    (name, True, 224) for name in STEM
]


@pytest.mark.parametrize(("name", "headed", "side"), CASES)
def test_predictions_equal_the_plain_transformers_loop(
    tmp_path: Path, name: str, headed: bool, side: int
) -> None:
    directory = make_checkpoint(tmp_path / "m", name, headed, side)
    embeddings, pixels = every_vector(name != "siglip"), noise(5, side)
    job = job_for(directory, labels=headed, embeddings=embeddings, top_k=3, batch_size=2)
    spec = identify(job)
    assert (spec.dimension, spec.layers, spec.prefix_tokens, spec.has_cls) == (
        32,
        3,
        PREFIX[name],
        name != "siglip",
    )
    assert spec.labels == (tuple(f"LABEL_{i}" for i in range(CLASSES)) if headed else ())
    assert (spec.pixels.shape, spec.precision, spec.batch_size, spec.engine) == (
        (side, side),
        "fp32",
        2,
        "torch",
    )

    require_plain(run(job, pixels, spec), job, name, pixels, atol=1e-5)


def test_the_drawn_shapes_are_recognised_and_bf16_agrees_with_fp32(shapes_model: str) -> None:
    rng = np.random.default_rng(99)
    kinds = np.arange(600) % len(demo_model.NAMES)
    pixels = demo_model.pixels_of([demo_model.draw(int(kind), rng) for kind in kinds])
    found = {
        p: run(job_for(shapes_model, embeddings=[Embedding()], precision=p), pixels)
        for p in ("fp32", "bf16")
    }
    exact, mixed = found["fp32"], found["bf16"]
    assert identify(job_for(shapes_model)).labels == demo_model.NAMES
    assert (exact.ids[:, 0] == kinds).mean() >= 0.97
    assert (mixed.ids[:, 0] == exact.ids[:, 0]).mean() >= 0.995
    a, b = exact.vectors["embedding"], mixed.vectors["embedding"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() >= 0.999, cosine.min()
    logits, tokens = plain_loop(shapes_model, "vit", True, pixels[:20])
    np.testing.assert_allclose(a[:20], tokens["last"][:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(exact.ids[:20, 0], logits.argmax(-1))
