"""What learns, how fast, and when a training stops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from support.training_runs import PIXELS
from vitray.training.batches import Batches
from vitray.training.config import TrainingConfig
from vitray.training.examples import gather
from vitray.training.student import rate_at

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_rate_rises_and_falls() -> None:
    fields = {"source": "x", "model": "m", "out": "o", "lr": 1.0, "warmup": 0.1}
    rates = {
        name: [rate_at(n, 100, TrainingConfig(**fields, schedule=name)) for n in range(100)]
        for name in ("cosine", "linear", "constant")
    }
    assert [found[4] for found in rates.values()] == [0.5] * 3 and all(
        found[10] == 1 for found in rates.values()
    )
    assert (
        rates["cosine"][55] == pytest.approx(0.5)
        and rates["linear"][55] == pytest.approx(0.5)
        and rates["constant"][99] == 1
    )
    assert 0 < rates["cosine"][99] < rates["linear"][99] < 0.02


def test_batches_follow_from_epoch_and_step_and_are_shared_out_whole(
    small: dict[str, object], tmp_path: Path
) -> None:
    config = TrainingConfig(
        **{**small, "out": "x", "workers": 2, "mixup": 0.4, "flip": True, "label_smoothing": 0.1}
    )
    training_data = gather(config, PIXELS, (), str(tmp_path))
    whole = Batches(config, training_data.train, PIXELS, 10, None)
    halves = Batches(config, training_data.train, PIXELS, 10, None, world=2)
    one, again, other = whole.batch(1, 2), whole.batch(1, 2), whole.batch(1, 3)
    assert torch.equal(one.pixels, again.pixels) and not torch.equal(one.pixels, other.pixels)
    for rank in (0, 1):
        half = halves.batch(1, 2, rank)
        assert torch.equal(half.pixels, one.pixels[rank::2]) and torch.equal(
            half.target, one.target[rank::2]
        )
    assert torch.allclose(one.target.sum(1), torch.ones(32)) and one.pixels.shape == (32, 3, 16, 16)
    plain = Batches(
        TrainingConfig(**{**small, "out": "x", "crop": 1.0, "flip": True}),
        replace(training_data.train, pixels=training_data.train.pixels[:, :16, :16]),
        PIXELS,
        10,
        None,
    )
    order = np.random.default_rng([0, 0]).permutation(len(training_data.train.ids))[:32]
    kept = (
        torch.from_numpy((plain.examples.pixels[order] / 255 - 0.5) / 0.5)
        .permute(0, 3, 1, 2)
        .float()
    )
    same = (torch.isclose(plain.batch(0, 0).pixels, kept, atol=1e-6)).flatten(1).all(1)
    mirrored = (torch.isclose(plain.batch(0, 0).pixels, kept.flip(3), atol=1e-6)).flatten(1).all(1)
    assert bool((same | mirrored).all()) and 0 < int(same.sum()) < 32
