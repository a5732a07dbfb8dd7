"""Variants of the model families, and which of their tokens a fast pass computes."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

# CI installs it: there these tests fail without
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or os.environ.get("CI")), reason="torch.compile needs g++ on a CPU"
)


@torch.library.custom_op("vitray_tests::fits", mutates_args=())
def fits(pixels: torch.Tensor, room: int) -> torch.Tensor:
    """Its input again, if it holds no more images than there is room for: also inside a compiled
    graph.
    """
    if len(pixels) > room:
        raise torch.OutOfMemoryError("out of memory")
    return pixels.clone()


@fits.register_fake
def _(pixels: torch.Tensor, room: int) -> torch.Tensor:
    return torch.empty_like(pixels)
