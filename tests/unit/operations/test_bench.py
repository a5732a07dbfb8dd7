"""vitray bench: what it says hangs together, and it writes nothing to the job's out."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitray.job import Job
from vitray.models import identify


def test_the_ceiling_counts_the_operations_of_the_paper(tmp_path: Path) -> None:
    """ViT-B/16 at 224: 35.13 billion operations, a multiply-add counted as two."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    from vitray.models.machine import flop_per_image, roofline

    config = ViTConfig(
        num_hidden_layers=12,
        hidden_size=96,
        num_attention_heads=3,
        intermediate_size=384,
        num_labels=4,
    )
    ViTForImageClassification(config).save_pretrained(str(tmp_path))
    ViTImageProcessorPil().save_pretrained(str(tmp_path))
    spec = identify(Job(source="in", model=str(tmp_path), out="out", device="cpu", engine="torch"))
    tokens, width = 197, 96
    by_hand = 12 * (12 * tokens * width**2 + 2 * tokens**2 * width) + 196 * 768 * width
    assert flop_per_image(spec) == 2 * by_hand
    assert 2 * (
        12 * (12 * tokens * 768**2 + 2 * tokens**2 * 768) + 196 * 768 * 768
    ) == pytest.approx(35.13e9, rel=1e-3)
    images, rate = roofline(spec, "cpu")
    assert images == pytest.approx(rate / flop_per_image(spec)) and rate > 1e9
