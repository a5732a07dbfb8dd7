"""A linear head with known weights, and the scores that must come out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factories.small_models import make_checkpoint, noise
from vitray.job import Job
from vitray.models.checkpoint import hash_weights
from vitray.models.checkpoint_store import locate
from vitray.models.linear_head import Head, write_head

NAMES = ("ant", "bee", "cow", "doe")
IMAGES = 14


def make_head(
    folder: Path,
    model: str,
    layer: int | None = None,
    pool: str = "cls",
    normalize: bool = False,
    **more: object,
) -> str:
    """A head of random numbers for the model's embeddings [32], whose scores tell images apart."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(len(NAMES), 32)).astype(np.float32) * (8 if normalize else 1.5)
    head = Head(
        NAMES,
        weight,
        rng.normal(size=len(NAMES)).astype(np.float32),
        layer,
        pool,
        normalize,
        model,
        "",
    )
    folder.mkdir()
    write_head(
        str(folder), replace(head, **{"weights_sha256": hash_weights(locate(model, None)), **more})
    )
    return str(folder)


def expected_scores(vectors: np.ndarray, head: Head) -> np.ndarray:
    logits = vectors.astype(np.float64) @ head.weight.T + head.bias
    chances = np.exp(logits - logits.max(1, keepdims=True))
    return chances / chances.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("vit"), "vit", True)


READS = [(None, "cls", False), (None, "mean", True), (2, "cls", True), (1, "patches_mean", False)]


@pytest.fixture
def job(vit: str, tmp_path: Path) -> Job:
    """Over two shards of pictures, one of them broken; two embeddings."""
    (tmp_path / "in").mkdir()
    for n, image in enumerate(noise(IMAGES)):
        Image.fromarray(image).save(tmp_path / "in" / f"{n:02d}.png")
    (tmp_path / "in" / "05x.png").write_bytes(b"no picture")
    vectors = [
        {"name": "raw"},
        {"layer": 2, "pool": "mean", "normalize": True, "dtype": "float16", "name": "half"},
    ]
    fields = {
        "engine": "torch",
        "device": "cpu",
        "precision": "fp32",
        "group_size": 8,
        "max_error_rate": 1,
        "top_k": 3,
    }
    return Job(
        source=f"{tmp_path}/in", model=vit, out=f"{tmp_path}/out", embeddings=vectors, **fields
    )
