"""A vision transformer's blocks with the modules and weights of transformers, made faster.

The numbers stay the same, but for float8, which is opt-in. Every family's block in transformers
5.23 is norm, attention, norm, MLP, with q_proj, k_proj, v_proj and fc1 so named. A block that looks
different stays as it is: slower, never wrong.
"""

from __future__ import annotations

import logging
import platform
import threading
import weakref
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, interpolate, scaled_dot_product_attention

PROJECTIONS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_proj", "k_proj", "v_proj", "out_proj"})
FIRST_NORMS = ("layernorm_before", "norm1", "layer_norm1")
GELUS = {"GELUActivation": "none", "GELUTanh": "tanh"}  # transformers' class -> oneDNN's algorithm
E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
FLOAT8_MULTIPLE = 16  # _scaled_mm takes sides that divide by this
FLOAT8_IMAGES = 64  # on which float8 is compared with bfloat16

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- attention


def fuse_attention(blocks: Any) -> None:
    """Replace every block's attention by an `Attention`, where it has the expected parts."""
    for block in blocks:
        for name, module in list(block.named_children()):
            scale = getattr(module, "scaling", getattr(module, "scale", None))
            if scale and {child for child, _ in module.named_children()} in PROJECTIONS:
                setattr(block, name, Attention(module, scale))


def limit_to_first_tokens(block: Any, tokens: int) -> bool:
    """Let the block output its first `tokens` only: the same numbers, with fewer queries and MLPs.

    Keys and values still come from all tokens. False, and no change, for a block without the
    expected parts.
    """
    attention = next((m for m in block.children() if isinstance(m, Attention)), None)
    norm = next((getattr(block, name) for name in FIRST_NORMS if hasattr(block, name)), None)
    if attention is None or norm is None:
        return False

    def cut(_block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        attention.per_thread.context = norm(inputs[0])
        return (inputs[0][:, :tokens], *inputs[1:]), named

    def forget(*_: Any) -> None:
        attention.per_thread.context = None

    block.register_forward_pre_hook(cut, with_kwargs=True)
    block.register_forward_hook(forget)
    return True


class _PerThread(threading.local):
    """context: what keys and values are computed from, when queries are computed from less."""

    context: Any = None


class Attention(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """One block's self-attention, with two projections instead of three.

    With a context it computes queries of the first tokens only.
    """

    def __init__(self, original: Any, scale: float) -> None:
        super().__init__()
        parts = [original.q_proj, original.k_proj, original.v_proj]
        weights = [part.weight.detach() for part in parts]
        biases = [
            torch.zeros(len(part.weight)) if part.bias is None else part.bias.detach()
            for part in parts
        ]  # BEiT's keys have none
        # the scale goes into the weights: exact for heads of 16, 64 or 256, where it is a power of
        # two
        self.query = _linear(weights[0] * scale, biases[0] * scale)
        self.key_value = _linear(torch.cat(weights[1:]), torch.cat(biases[1:]))
        self.out = getattr(original, "o_proj", None) or original.out_proj
        self.head_dim = int(original.head_dim)
        # torch's fused CPU kernel (2.13) multiplies bf16 fast with AMX alone: a Zen 5 took 15 ms
        # where matmuls take 7
        self._matmuls = (
            torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
        )
        self.per_thread = _PerThread()

    def forward(
        self, hidden_states: Any, attention_mask: Any = None, **_unused: Any
    ) -> tuple[Any, None]:
        images, queries, _ = hidden_states.shape
        context = self.per_thread.context
        if context is None:
            context = hidden_states
        q = self.query(hidden_states).view(images, queries, -1, self.head_dim).transpose(1, 2)
        k, v = (
            self.key_value(context)
            .view(images, context.shape[1], 2, -1, self.head_dim)
            .permute(2, 0, 3, 1, 4)
        )
        if torch.compiler.is_exporting():
            scores = q @ k.transpose(-2, -1)
            # in an export transformers makes a boolean padding mask, all true, since images have
            # no padding; BEiT's mask is a bias
            is_bias = attention_mask is not None and attention_mask.dtype is not torch.bool
            mixed = (scores + attention_mask if is_bias else scores).softmax(-1) @ v
        elif attention_mask is None and self._matmuls and q.is_cpu and q.dtype is torch.bfloat16:
            mixed = _attend_by_matmul(q, k, v)
        else:
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=1.0)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def _linear(weight: Any, bias: Any) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def _attend_by_matmul(q: Any, k: Any, v: Any) -> Any:
    """softmax(q k^T) v of heads [N, H, T, d], as one batch of matrices: fast in oneDNN."""
    images, heads, queries, width = q.shape
    q, k, v = (x.reshape(images * heads, -1, width) for x in (q, k, v))
    mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return mixed.view(images, heads, queries, width)


# ---------------------------------------------------------------- packed linear layers


def pack(blocks: Any, dtype: torch.dtype) -> bool:
    """Lay out the weights of every linear layer for oneDNN, once instead of in every batch.

    False where oneDNN cannot. Linear layers on a Zen 5: float32 95 -> 210 GFLOP/s a core, because
    torch takes MKL otherwise; bfloat16 390 -> 430.
    """
    if not can_pack(dtype):
        return False
    for module in [m for block in blocks for m in block.modules()]:
        activation = type(getattr(module, "activation_fn", None)).__name__
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                gelu = GELUS.get(activation) if name == "fc1" else None
                setattr(module, name, PackedLinear(child, gelu))
                if gelu:
                    module.activation_fn = torch.nn.Identity()
    return True


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type here."""
    mkldnn = torch.ops.mkldnn
    checks = {
        torch.bfloat16: mkldnn._is_mkldnn_bf16_supported,
        torch.float16: mkldnn._is_mkldnn_fp16_supported,
    }
    is_supported = checks.get(dtype, torch.backends.mkldnn.is_available)
    return platform.machine() in ("x86_64", "AMD64") and bool(is_supported())


# Compiled graphs name a packed layer by its number. With its weights inside, torch could not keep
# them for the next start, since oneDNN's layout cannot be written to disk. Free numbers are used
# again, so that the next start has the same ones.
_packed: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_numbering = threading.Lock()

_library = torch.library.Library("vitray", "FRAGMENT")
_library.define("packed_linear(Tensor x, int number, int outputs) -> Tensor")
_library.impl("packed_linear", lambda x, number, outputs: _packed[number].multiply(x), "CPU")


torch.library.register_fake(
    "vitray::packed_linear", lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs)
)


class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer in oneDNN's layout, followed by GELU in the same pass if one is named."""

    def __init__(self, original: torch.nn.Linear, gelu: str | None) -> None:
        super().__init__()
        weight = original.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if original.bias is None else original.bias.detach()
        self._activation = ("gelu" if gelu else "none", list[float](), gelu or "")
        self._outputs = original.out_features
        with _numbering:
            self._number = next(number for number in count() if number not in _packed)
            _packed[self._number] = self

    def forward(self, x: Any) -> Any:
        """float [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            return torch.ops.vitray.packed_linear(x, self._number, self._outputs)
        return self.multiply(x)

    def multiply(self, x: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._activation)


# ---------------------------------------------------------------- float8
# e4m3 on GPUs that multiply it: weights are scaled by output channel, activations by token. Three
# bits of mantissa change the numbers, so their effect on a model is measured whenever it is opened.


@dataclass(frozen=True, slots=True)
class Float8Agreement:
    """How well float8 agrees with bfloat16.

    labels: share of images with the same first label; None without labels.
    cosine: the least of any embedding; None without vectors.
    """

    labels: float | None
    cosine: float | None


def quantise(forward: Any, blocks: Any, pixels: Any) -> Float8Agreement:
    """Replace the blocks' linear layers by float8 ones, and measure the effect on `forward`.

    forward: pixels -> scores, ids, vectors.
    """
    with torch.inference_mode():
        original = [column.clone() for column in forward(pixels)]
        for parent in [m for block in blocks for m in block.modules()]:
            for name, child in list(parent.named_children()):
                if type(child) is torch.nn.Linear and _fits_float8(child):
                    setattr(parent, name, Float8Linear(child))
        agreement = _float8_agreement(original, forward(pixels))
    labels = "" if agreement.labels is None else f" {agreement.labels:.1%} of labels,"
    cosine = "" if agreement.cosine is None else f" cosine {agreement.cosine:.4f} or more"
    log.warning("fp8 against bf16 on %d synthetic images:%s%s", len(pixels), labels, cosine)
    return agreement


def _fits_float8(layer: torch.nn.Linear) -> bool:
    return all(side % FLOAT8_MULTIPLE == 0 for side in layer.weight.shape)


def synthetic_images(images: int, shape: tuple[int, int], device: Any) -> Any:
    """uint8 [n, H, W, 3]: smooth coloured blotches, the same every time.

    Plain noise would not do, since all of it looks the same to a model.
    """
    noise = torch.rand(images, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    smooth = interpolate(noise, shape, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(device)


def _float8_agreement(original: list[Any], quantised: list[Any]) -> Float8Agreement:
    ids, new_ids = original[1], quantised[1]
    labels = float((ids[:, 0] == new_ids[:, 0]).float().mean()) if ids.shape[1] else None
    least = [
        float(cosine_similarity(one.float(), two.float()).min())
        for one, two in zip(original[2:], quantised[2:])
    ]
    return Float8Agreement(labels, min(least) if least else None)


class Float8Linear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer of bfloat16 input and output that multiplies in float8."""

    def __init__(self, original: torch.nn.Linear) -> None:
        super().__init__()
        weight, scale = scaled(original.weight.detach())
        # by columns, as the hardware reads them
        self._weight = weight.t()
        self._scale = scale.t()
        self._bias = None
        if original.bias is not None:
            self._bias = original.bias.detach().to(torch.bfloat16)

    def forward(self, x: Any) -> Any:
        """bfloat16 [..., in] -> [..., out]."""
        rows, scale = scaled(x.reshape(-1, x.shape[-1]))
        product = torch._scaled_mm(
            rows,
            self._weight,
            scale_a=scale,
            scale_b=self._scale,
            bias=self._bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return product.view(*x.shape[:-1], -1)


def scaled(rows: Any) -> tuple[Any, Any]:
    """float [n, d] as e4m3 [n, d] and float32 [n, 1]: their product is the input, rounded.

    The largest value of each row becomes the largest of e4m3.
    """
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / E4M3_LARGEST
    return (rows.float() / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3), scale
