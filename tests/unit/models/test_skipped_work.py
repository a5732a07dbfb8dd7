"""Blocks and tokens that nobody reads are not computed, and change no result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factories.small_models import PREFIX, STEM, job_for, make_checkpoint, noise, plain_loop, run
from vitray.job import Embedding
from vitray.models import identify, open_model, vector_columns
from vitray.models.blocks import (
    Attention,
    PackedLinear,
    fuse_attention,
    limit_to_first_tokens,
    pack,
)
from vitray.models.torch_engine import TorchModel
from vitray.schema import ModelOutputs

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()  # its limit of recompilations is one for all models of a process


FIRST_TOKENS = [(name, headed) for name in STEM for headed in (True, False)]
EVERY_TOKEN = {
    ("siglip", True),
    ("siglip", False),
    ("beit", True),
    ("beit", False),
    ("beit_mean", True),
    ("beit_mean", False),
}
EVERY_TOKEN |= {
    (name, True) for name in ("dinov2", "dinov2_with_registers", "clip")
}  # their heads read the patches


def tokens_seen(model: TorchModel) -> dict[int, int]:
    """How many tokens each block's MLP sees, filled by the next forward pass."""
    seen: dict[int, int] = {}
    mlps = [module for name, module in model.forward.named_modules() if name.endswith(".mlp")]
    for n, mlp in enumerate(mlps):
        mlp.register_forward_hook(
            lambda _module, inputs, _output, n=n: seen.update({n: inputs[0].shape[1]})
        )
    return seen


@pytest.mark.parametrize(("name", "headed"), FIRST_TOKENS)
def test_the_last_block_computes_the_first_tokens_alone_where_only_they_are_read(
    tmp_path: Path, name: str, headed: bool
) -> None:
    directory, pixels = make_checkpoint(tmp_path, name, headed), noise(6)
    pool = "mean" if name == "siglip" else "cls"
    lean = [Embedding(pool=pool), Embedding(layer=3, pool=pool)]
    job, whole = (
        job_for(directory, headed, e, top_k=3)
        for e in (lean, [*lean, Embedding(pool="patches_mean")])
    )
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 3 if headed else 0), "cpu", 2
    )
    assert sum(isinstance(module, Attention) for module in model.forward.modules()) == 3
    seen = tokens_seen(model)
    found, expected = model.predict(pixels), run(whole, pixels)
    every = 16 + PREFIX[name]
    last = every if (name, headed) in EVERY_TOKEN else PREFIX[name]
    assert seen == {0: every, 1: every, 2: last}
    for column in found.vectors:
        np.testing.assert_allclose(
            found.vectors[column], expected.vectors[column], rtol=1e-5, atol=1e-5
        )
    if headed:
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit", "clip", "siglip"])
def test_blocks_above_the_highest_layer_asked_for_are_not_computed(
    tmp_path: Path, name: str
) -> None:
    directory, pixels = make_checkpoint(tmp_path, name, False), noise(4)
    pool = "mean" if name == "siglip" else "cls"
    job = job_for(directory, False, [Embedding(layer=layer, pool=pool) for layer in (1, 2)])
    spec = identify(job)
    model = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), 0), "cpu", 2)
    seen = tokens_seen(model)
    found = model.predict(pixels)
    assert sorted(seen) == [0, 1]
    _, tokens = plain_loop(directory, name, False, pixels)
    for layer in (1, 2):
        expected = tokens[layer][:, 0] if pool == "cls" else tokens[layer].mean(1)
        np.testing.assert_allclose(
            found.vectors[f"embedding_{pool}_{layer}"], expected, rtol=1e-4, atol=1e-5
        )


def test_blocks_of_another_make_are_left_as_they_are() -> None:
    block = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    with torch.inference_mode():
        before = block(x)
        fuse_attention([block])
        assert not limit_to_first_tokens(block, 1)
        torch.testing.assert_close(block(x), before, rtol=0, atol=0)
    assert not any(isinstance(module, Attention) for module in block.modules())


def test_linear_layers_are_packed_with_their_gelu_on_this_kind_of_cpu(tmp_path: Path) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True))
    model = open_model(identify(job), ModelOutputs((), 1), "cpu", 2)
    kinds = [type(module) for module in model.forward.modules()]
    if not pack([], torch.float32):
        pytest.skip("no oneDNN here")
    assert (
        kinds.count(PackedLinear) == 3 * 5
    )  # query, key and value, out, fc1 and fc2 of three blocks
    assert kinds.count(torch.nn.Linear) == 1 and not any(
        kind.__name__ == "GELUActivation" for kind in kinds
    )
