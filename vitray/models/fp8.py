"""Linear layers in float8 (e4m3), for GPUs that multiply it: weights scaled by output channel,
activations by token as they come.

Opt-in: three bits of mantissa move the numbers, so what they do to this model is measured whenever
it is opened.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from vitray.errors import ModelError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # _scaled_mm takes sides that divide by this
CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
IMAGES = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of float8 with bfloat16. labels: share of images with the same first label, None without
    labels; cosine: the least, None without vectors.
    """

    labels: float | None
    cosine: float | None


def require(device: str) -> None:
    """Raises ModelError where the hardware has no float8."""
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    if capability is None or capability < CAPABILITY:
        has = (
            device
            if capability is None
            else f"a GPU of compute capability {capability[0]}.{capability[1]}"
        )
        raise ModelError(
            f"precision fp8 needs a GPU of compute capability 8.9 or more, and this is {has}. Set "
            f"precision: auto."
        )


def quantise(forward: Any, blocks: Any, pixels: Any) -> Agreement:
    """The blocks' linear layers become float8, in place; how well `forward` (pixels -> scores, ids,
    vectors) then agrees with itself.
    """
    with torch.inference_mode():
        before = [column.clone() for column in forward(pixels)]
        for parent in [m for block in blocks for m in block.modules()]:
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear and not any(
                    side % MULTIPLE for side in child.weight.shape
                ):
                    setattr(parent, name, Float8Linear(child))
        agreement = _agreement(before, forward(pixels))
    labels = "" if agreement.labels is None else f" {agreement.labels:.1%} of labels,"
    cosine = "" if agreement.cosine is None else f" cosine {agreement.cosine:.4f} or more"
    log.warning("fp8 against bf16 on %d synthetic images:%s%s", len(pixels), labels, cosine)
    return agreement


def synthetic(images: int, shape: tuple[int, int], device: Any) -> Any:
    """uint8 [n, H, W, 3]: smooth coloured blotches, the same every time; plain noise all looks
    alike to a model.
    """
    noise = torch.rand(images, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise, shape, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(device)


def _agreement(before: list[Any], after: list[Any]) -> Agreement:
    ids, vectors = (before[1], after[1]), list(zip(before[2:], after[2:]))
    labels = float((ids[0][:, 0] == ids[1][:, 0]).float().mean()) if ids[0].shape[1] else None
    cosines = [
        torch.nn.functional.cosine_similarity(a.float(), b.float()).min() for a, b in vectors
    ]
    return Agreement(labels, float(min(cosines)) if cosines else None)


class Float8Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer of bfloat16 input and output that multiplies in float8."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__()
        weight, self._scale = scaled(plain.weight.detach())
        self._weight, self._scale = (
            weight.t(),
            self._scale.t(),
        )  # by columns: what the hardware reads
        self._bias = None if plain.bias is None else plain.bias.detach().to(torch.bfloat16)

    def forward(self, x: Any) -> Any:
        """bfloat16 [..., in] -> [..., out]."""
        rows, scale = scaled(x.reshape(-1, x.shape[-1]))
        named = {
            "scale_a": scale,
            "scale_b": self._scale,
            "bias": self._bias,
            "out_dtype": torch.bfloat16,
        }
        return torch._scaled_mm(rows, self._weight, **named, use_fast_accum=True).view(
            *x.shape[:-1], -1
        )


def scaled(rows: Any) -> tuple[Any, Any]:
    """float [n, d] -> e4m3 [n, d] and float32 [n, 1], whose product it is, rounded: each row's
    largest becomes e4m3's largest.
    """
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (rows.float() / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale
