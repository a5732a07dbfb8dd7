"""Models: predictions equal a plain transformers loop, whatever the batch, the pool and the
precision.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from factories.small_models import CLASSES, job_for, make_checkpoint, noise, plain_loop, run
from vitray.errors import ModelError
from vitray.job import Embedding
from vitray.models import identify, open_model
from vitray.models.torch_engine import Network, TorchModel
from vitray.models.types import Placement
from vitray.operations import demo_model
from vitray.schema import ModelOutputs, VectorColumn

pytestmark = pytest.mark.usefixtures("two_threads")


def test_labels_alone_and_no_images_keep_shapes_and_types(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    alone = run(job_for(directory, top_k=50), noise(3))
    assert alone.ids.shape == alone.scores.shape == (3, CLASSES) and alone.vectors == {}
    np.testing.assert_allclose(alone.scores.sum(1), 1, rtol=1e-5)
    none = run(job_for(directory, embeddings=[Embedding(dtype="float16")], top_k=2), noise(0))
    assert (none.ids.shape, none.ids.dtype, none.scores.dtype) == ((0, 2), np.int32, np.float32)
    assert (none.vectors["embedding"].shape, none.vectors["embedding"].dtype) == (
        (0, 32),
        np.float16,
    )


def test_float16_and_normalize_come_after_pooling_in_float32(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "dinov2", False)
    plain, unit = (
        Embedding(pool="mean", name="plain"),
        Embedding(pool="mean", normalize=True, dtype="float16", name="unit"),
    )
    vectors = run(job_for(directory, False, [plain, unit]), noise(4)).vectors
    expected = vectors["embedding_plain"] / np.linalg.norm(
        vectors["embedding_plain"], axis=1, keepdims=True
    )
    assert vectors["embedding_unit"].dtype == np.float16
    np.testing.assert_allclose(vectors["embedding_unit"], expected, atol=5e-4)


def test_multi_label_heads_score_with_sigmoid(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True, problem_type="multi_label_classification")
    job = job_for(directory, top_k=CLASSES)
    logits, _ = plain_loop(directory, "vit", True, noise(3))
    assert identify(job).multi_label
    np.testing.assert_allclose(
        run(job, noise(3)).scores, logits.sigmoid().topk(CLASSES)[0], rtol=1e-4
    )


def test_auto_is_resolved_for_this_machine(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    spec = identify(job_for(directory, precision="auto", batch_size="auto"))
    native = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
    assert (spec.precision, spec.batch_size) == ("bf16" if native else "fp32", 16)
    assert identify(job_for(directory, precision="fp16", batch_size=3)).precision == "fp16"


def test_read_only_pixels_predict_and_wrong_shapes_are_named(tmp_path: Path) -> None:
    job, pixels = job_for(make_checkpoint(tmp_path, "vit", True)), noise(2)
    pixels.flags.writeable = False
    model = open_model(identify(job), ModelOutputs((), 1), "cpu", 2)
    assert model.predict(pixels).ids.shape == (2, 1)
    with pytest.raises(ModelError, match=r"uint8 \[N, 32, 32, 3\], not uint8 \[2, 16, 16, 3\]"):
        model.predict(noise(2, 16))


def test_results_that_are_not_finite_raise_instead_of_being_stored(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", False)
    model = transformers.ViTModel.from_pretrained(directory)
    torch.nn.init.constant_(model.layernorm.weight, 1e6)
    model.save_pretrained(directory)
    with pytest.raises(ModelError, match="`embedding` is not finite"):
        run(job_for(directory, False, [Embedding(dtype="float16")]), noise(2))


class SmallMemory(torch.nn.Module):
    """A tower that fits `room` images: tokens say the image's mean."""

    def __init__(self, room: int, error: Exception) -> None:
        super().__init__()
        self.room, self.error, self.seen = room, error, []

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        if len(pixel_values) > self.room:
            raise self.error
        self.seen.append(len(pixel_values))
        return SimpleNamespace(
            last_hidden_state=pixel_values.mean((1, 2, 3))[:, None, None].expand(-1, 4, 32)
        )


def small_memory(room: int, error: Exception, directory: str) -> tuple[SmallMemory, TorchModel]:
    spec = dataclasses.replace(identify(job_for(directory)), batch_size=16)
    tower = SmallMemory(room, error)
    column = VectorColumn("embedding", 32, None, "mean", False, "float32")
    return tower, TorchModel(
        Network(tower, tower, [], None), spec, ModelOutputs((column,), 0), Placement("cpu")
    )


def test_too_little_memory_halves_the_batch_and_loses_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory, pixels = make_checkpoint(tmp_path, "vit", True), noise(21)
    tower, model = small_memory(5, torch.OutOfMemoryError("CUDA out of memory"), directory)
    vectors = model.predict(pixels).vectors["embedding"]
    np.testing.assert_allclose(vectors[:, 0], (pixels / 255 - 0.5).mean((1, 2, 3)) / 0.5, atol=1e-5)
    assert tower.seen == [4, 4, 4, 4, 4, 1]
    model.predict(pixels[:8])
    assert tower.seen[6:] == [4, 4]
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "halving" in caplog.text
    _, hopeless = small_memory(
        0, RuntimeError("DefaultCPUAllocator: can't allocate memory"), directory
    )
    with pytest.raises(ModelError, match="does not fit cpu"):
        hopeless.predict(pixels)
    _, broken = small_memory(0, RuntimeError("something else"), directory)
    with pytest.raises(RuntimeError, match="something else"):
        broken.predict(pixels)


def test_drawing_is_repeatable() -> None:
    one, other = (np.asarray(demo_model.draw(5, np.random.default_rng(7))) for _ in range(2))
    assert one.shape == (64, 64, 3)
    np.testing.assert_array_equal(one, other)
