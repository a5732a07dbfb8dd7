"""A vision transformer's blocks, made fast over transformers' own modules and weights; what they
say stays the same.

Every family's block in transformers 5.23 is norm, attention, norm, MLP, with q_proj, k_proj, v_proj
and fc1 so named. A block that looks different is left as it is: slower, never wrong.
"""

from __future__ import annotations

import platform
import threading
import weakref
from itertools import count
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

PROJECTIONS = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_proj", "k_proj", "v_proj", "out_proj"})
FIRST_NORMS = ("layernorm_before", "norm1", "layer_norm1")
GELUS = {"GELUActivation": "none", "GELUTanh": "tanh"}  # transformers' class -> oneDNN's algorithm


def fuse_attention(blocks: Any) -> None:
    """Every block's attention becomes an `Attention`, if it is of the known make."""
    for block in blocks:
        for name, module in list(block.named_children()):
            scale = getattr(module, "scaling", getattr(module, "scale", None))
            if scale and {child for child, _ in module.named_children()} in PROJECTIONS:
                setattr(block, name, Attention(module, scale))


def ask_first_tokens_only(block: Any, tokens: int) -> bool:
    """Let the block's output be its first `tokens` alone: the same numbers, without the others'
    queries and MLP.

    Keys and values still come from all tokens. False when the block is not of the known make: then
    it is as it was.
    """
    attention = next((m for m in block.children() if isinstance(m, Attention)), None)
    norm = next((getattr(block, name) for name in FIRST_NORMS if hasattr(block, name)), None)
    if attention is None or norm is None:
        return False

    def cut(_block: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        attention.here.context = norm(inputs[0])
        return (inputs[0][:, :tokens], *inputs[1:]), named

    def forget(*_: Any) -> None:
        attention.here.context = None

    block.register_forward_pre_hook(cut, with_kwargs=True)
    block.register_forward_hook(forget)
    return True


def pack(blocks: Any, dtype: torch.dtype) -> bool:
    """Lay out the weights of every linear layer for oneDNN, once and not in every batch. False
    where oneDNN cannot.

    Linear layers of a Zen 5: float32 95 -> 210 GFLOP/s a core (torch takes MKL otherwise), bfloat16
    390 -> 430.
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
    known = torch.ops.mkldnn
    supported = {
        torch.bfloat16: known._is_mkldnn_bf16_supported,
        torch.float16: known._is_mkldnn_fp16_supported,
    }
    return platform.machine() in ("x86_64", "AMD64") and bool(
        supported.get(dtype, torch.backends.mkldnn.is_available)()
    )


# Compiled graphs name a packed layer by its number: with its weights inside torch could not keep
# them for the next start, as oneDNN's layout cannot be written to disk. Numbers that are free again
# are given again, so that the next start has the same ones.
_packed: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_numbering = threading.Lock()


_library = torch.library.Library("vitray", "FRAGMENT")
_library.define("packed_linear(Tensor x, int number, int outputs) -> Tensor")
_library.impl("packed_linear", lambda x, number, outputs: _packed[number].multiply(x), "CPU")


torch.library.register_fake(
    "vitray::packed_linear", lambda x, number, outputs: x.new_empty(*x.shape[:-1], outputs)
)


class PackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A linear layer as oneDNN wants it, with GELU in the same pass if one is named."""

    def __init__(self, plain: torch.nn.Linear, gelu: str | None) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach().contiguous())
        self._bias = None if plain.bias is None else plain.bias.detach()
        self._after = ("gelu" if gelu else "none", list[float](), gelu or "")
        self._outputs = plain.out_features
        with _numbering:
            self._number = next(number for number in count() if number not in _packed)
            _packed[self._number] = self

    def forward(self, x: Any) -> Any:
        """float [..., in] -> [..., out]."""
        if torch.compiler.is_compiling():
            return torch.ops.vitray.packed_linear(x, self._number, self._outputs)
        return self.multiply(x)

    def multiply(self, x: Any) -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._after)


class _Here(threading.local):
    """context: what keys and values are made of, when that is more than what queries are made of.
    Each thread has its own.
    """

    context: Any = None


class Attention(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """One block's self-attention: two projections instead of three; queries of the first tokens
    only where there is a context.
    """

    def __init__(self, plain: Any, scale: float) -> None:
        super().__init__()
        parts = [plain.q_proj, plain.k_proj, plain.v_proj]
        weights = [p.weight.detach() for p in parts]
        biases = [
            torch.zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in parts
        ]  # BEiT's keys have none
        # the scale goes into the weights: exact for heads of 16, 64 or 256, where it is a power of
        # two
        self.query = _linear(weights[0] * scale, biases[0] * scale)
        self.key_value = _linear(torch.cat(weights[1:]), torch.cat(biases[1:]))
        self.out = getattr(plain, "o_proj", None) or plain.out_proj
        self.head_dim = int(plain.head_dim)
        # torch's fused CPU kernel (2.13) multiplies bf16 fast with AMX alone: a Zen 5 took 15 ms
        # where matmuls take 7
        self._matmuls = (
            torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
        )
        self.here = _Here()

    def forward(
        self, hidden_states: Any, attention_mask: Any = None, **_unused: Any
    ) -> tuple[Any, None]:
        images, asked, _ = hidden_states.shape
        context = hidden_states if self.here.context is None else self.here.context
        q = self.query(hidden_states).view(images, asked, -1, self.head_dim).transpose(1, 2)
        k, v = (
            self.key_value(context)
            .view(images, context.shape[1], 2, -1, self.head_dim)
            .permute(2, 0, 3, 1, 4)
        )
        if torch.compiler.is_exporting():
            scores = q @ k.transpose(-2, -1)
            # in an export transformers makes a boolean mask of padding, all true: images have none;
            # BEiT's is a bias
            biased = attention_mask is not None and attention_mask.dtype is not torch.bool
            mixed = (scores + attention_mask if biased else scores).softmax(-1) @ v
        elif attention_mask is None and self._matmuls and q.is_cpu and q.dtype is torch.bfloat16:
            mixed = _attend_by_matmul(q, k, v)
        else:
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=1.0)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


def _linear(weight: Any, bias: Any) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (
        torch.nn.Parameter(tensor, requires_grad=False) for tensor in (weight, bias)
    )
    return layer


def _attend_by_matmul(q: Any, k: Any, v: Any) -> Any:
    """softmax(q k^T) v, heads [N, H, T, d] as one batch of matrices, which oneDNN multiplies at
    full speed.
    """
    images, heads, asked, width = q.shape
    q, k, v = (x.reshape(images * heads, -1, width) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(
        images, heads, asked, width
    )
