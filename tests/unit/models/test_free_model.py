"""The free model of `vitray bench --free-model`: ViT-B/16's shapes, and the wait of its name."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vitray.models import Model, open_model
from vitray.models.free import free_spec
from vitray.schema import ModelOutputs, VectorColumn

VECTORS = (
    VectorColumn("embedding_cls", 768, None, "cls", False, "float32"),
    VectorColumn("embedding_mean", 768, 6, "mean", False, "float16"),
)


def opened(microseconds: int, top_k: int = 5) -> Model:
    return open_model(free_spec(microseconds), ModelOutputs(VECTORS, top_k), "auto", 2)


def pixels(images: int) -> np.ndarray:
    return np.zeros((images, *free_spec(0).pixels.shape, 3), np.uint8)


def test_the_spec_is_that_of_a_vit_b_16() -> None:
    spec = free_spec(80)
    assert (spec.model, spec.engine) == ("free:80", "free")
    assert (spec.dimension, spec.layers, spec.prefix_tokens) == (768, 12, 1)
    assert (len(spec.labels), len(set(spec.labels))) == (1000, 1000)
    assert (spec.pixels.shape, spec.pixels.resample) == ((224, 224), 2)
    assert spec.pixels.mean == spec.pixels.std == (0.5, 0.5, 0.5)
    assert spec.weights_sha256 != free_spec(0).weights_sha256


@pytest.mark.parametrize("images", [0, 1, 300])
def test_every_image_gets_labels_and_finite_vectors(images: int) -> None:
    found = opened(0).predict(pixels(images))
    assert found.ids is not None and found.scores is not None
    assert found.ids.tolist() == [[0, 1, 2, 3, 4]] * images
    assert found.scores.tolist() == [[0.5, 0.25, 0.125, 0.0625, 0.03125]] * images
    assert (found.ids.dtype, found.scores.dtype) == (np.int32, np.float32)
    for column in VECTORS:
        vectors = found.vectors[column.column]
        assert vectors.shape == (images, 768) and vectors.dtype == column.dtype
        assert np.isfinite(vectors).all()


def test_a_model_without_labels_gives_vectors_alone() -> None:
    found = opened(0, top_k=0).predict(pixels(2))
    assert found.ids is None and found.scores is None
    assert set(found.vectors) == {"embedding_cls", "embedding_mean"}


def test_later_batches_share_the_vectors_of_the_first() -> None:
    model = opened(0)
    first = model.predict(pixels(8)).vectors["embedding_cls"]
    assert np.shares_memory(first, model.predict(pixels(3)).vectors["embedding_cls"])


def test_threads_wait_for_each_other_as_for_one_gpu() -> None:
    model = opened(1000)
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(model.predict, [pixels(50), pixels(50)]))
    assert time.perf_counter() - started >= 0.1


def test_a_process_opens_it_without_torch() -> None:
    script = """
import sys
from vitray.models import open_model
from vitray.models.free import free_spec
from vitray.schema import ModelOutputs
open_model(free_spec(0), ModelOutputs((), 5), "auto", 2).predict([])
assert not {"torch", "transformers", "ray"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
