"""No engine copies pixels on the host before it converts them, or keeps them afterwards."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from factories.small_models import job_for, make_checkpoint, noise
from vitray.job import Embedding
from vitray.models import identify, open_model, vector_columns
from vitray.models.types import Model
from vitray.schema import ModelOutputs
from vitray.totals import copied_bytes


def opened(folder: Path, engine: str) -> Model:
    job = job_for(
        make_checkpoint(folder / "m", "vit", True),
        embeddings=[Embedding()],
        batch_size=16,
        engine=engine,
    )
    spec = identify(job)
    return open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 3), "cpu", 2)


@pytest.mark.parametrize("engine", ["torch", "onnx", "openvino"])
def test_pixels_are_read_where_they_are_and_not_kept(tmp_path: Path, engine: str) -> None:
    """Decoder processes wait for the memory of pixels that an engine keeps."""
    model = opened(tmp_path, engine)
    pixels = noise(43)
    expected = model.predict(pixels.copy())
    before = copied_bytes.value
    found = model.predict(pixels)
    assert copied_bytes.value == before
    np.testing.assert_array_equal(found.vectors["embedding"], expected.vectors["embedding"])
    is_alive = weakref.ref(pixels)
    del pixels
    gc.collect()
    assert is_alive() is None


@pytest.mark.parametrize("engine", ["torch", "onnx", "openvino"])
def test_pixels_that_are_not_contiguous_are_copied_once(tmp_path: Path, engine: str) -> None:
    model = opened(tmp_path, engine)
    pixels = noise(20)
    before = copied_bytes.value
    found = model.predict(np.asfortranarray(pixels))
    assert copied_bytes.value == before + pixels.nbytes
    expected = model.predict(pixels)
    np.testing.assert_allclose(found.vectors["embedding"], expected.vectors["embedding"], atol=1e-5)
