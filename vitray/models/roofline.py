"""What the hardware would allow: a model's multiplications over the fastest matrix product measured
here. Loads torch.
"""

from __future__ import annotations

import time

import torch

from vitray.models import checkpoint
from vitray.models.blocks import PackedLinear, can_pack
from vitray.models.forward import DTYPES
from vitray.models.machine import cores
from vitray.schema import ModelSpec

SECONDS = 2.0  # of measuring
SHAPES = {"cpu": (4096, 768, 3072)}  # rows, in, out; other devices: large enough to fill an H200
LARGE = (8192, 8192, 8192)


def roofline(spec: ModelSpec, device: str) -> tuple[float, float]:
    """Images/s that this machine would reach if it only multiplied matrices, and the operations/s
    behind that. Takes 2 s.
    """
    rate = matmul_flops(spec.precision, device)
    return rate / flop_per_image(spec), rate


def flop_per_image(spec: ModelSpec) -> float:
    """Floating-point operations of one image: patch embedding, projections, attention's two
    products, MLP. ViT-B/16: 35.13e9.
    """
    config = checkpoint.read_config(checkpoint.locate(spec.model, spec.revision))
    vision = getattr(config.hf, "vision_config", config.hf)
    width = spec.dimension
    inner = int(
        getattr(vision, "intermediate_size", 0) or width * vision.mlp_ratio
    )  # DINOv2's config has a ratio
    height, side = spec.pixels.shape
    patches = (height // config.patch_size) * (side // config.patch_size)
    tokens = patches + spec.prefix_tokens
    block = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    return 2.0 * (spec.layers * block + patches * 3 * config.patch_size**2 * width)


def matmul_flops(precision: str, device: str) -> float:
    """Operations/s of the fastest of many products of one matrix shape, on all cores or the whole
    device.
    """
    dtype = DTYPES.get(precision, torch.bfloat16)
    rows, inputs, outputs = SHAPES.get(device, LARGE)
    layer = torch.nn.Linear(inputs, outputs, device=device, dtype=dtype)
    run = PackedLinear(layer, None) if device == "cpu" and can_pack(dtype) else layer
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    before, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(cores())
    try:
        end = time.perf_counter() + SECONDS
        with torch.inference_mode():
            while time.perf_counter() < end:
                started = time.perf_counter()
                run(x)
                if device != "cpu":
                    torch.accelerator.synchronize()
                best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2.0 * rows * inputs * outputs / best
