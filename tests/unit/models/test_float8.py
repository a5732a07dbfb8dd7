"""float8 products, and how well a float8 model agrees."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from factories.small_models import job_for, make_checkpoint, noise, run
from vitray.job import Embedding
from vitray.models import blocks, checkpoint_store, identify, loading, model_outputs
from vitray.models.torch_engine import TorchModel
from vitray.models.types import Placement


def test_float8_is_the_product_of_what_it_rounds_to() -> None:
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(64, 48).bfloat16(), (10 * torch.randn(5, 7, 64)).bfloat16()
    x[0, 0] = 0  # an empty row has no scale
    (rows, row_scale), (weight, weight_scale) = (
        blocks.scaled(x.reshape(-1, 64)),
        blocks.scaled(plain.weight.detach()),
    )
    assert (
        rows.float() * row_scale - x.reshape(-1, 64).float()
    ).abs().max() <= x.abs().max() / 16  # half of the last of 3 bits
    expected = (rows.float() * row_scale) @ (weight.float() * weight_scale).t() + plain.bias.float()
    found = blocks.Float8Linear(plain)(x)
    assert found.dtype == torch.bfloat16 and found.shape == (5, 7, 48)
    torch.testing.assert_close(
        found.reshape(-1, 48).float(), expected.detach(), rtol=2**-7, atol=2**-7
    )


def test_a_float8_model_says_how_well_it_agrees(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    job = job_for(directory, embeddings=[Embedding()], precision="bf16", batch_size=8)
    mixed = dataclasses.replace(identify(job), precision="fp8")
    network = loading.load_network(checkpoint_store.locate(directory, None), labels=True)
    with caplog.at_level(logging.WARNING):
        model = TorchModel(network, mixed, model_outputs(job, mixed), Placement("cpu"))
    kinds = [type(m).__name__ for block in network.blocks for m in block.modules()]
    assert kinds.count("Float8Linear") == 5 * 3 and not {"Linear", "PackedLinear"} & set(kinds)
    assert model.agreement.cosine is not None and 0.98 < model.agreement.cosine < 1
    assert "fp8 against bf16 on 8 synthetic images" in caplog.text
    pixels = noise(24)
    found, expected = model.predict(pixels), run(job, pixels)
    a, b = found.vectors["embedding"], expected.vectors["embedding"]
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.98
