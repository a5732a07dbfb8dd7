"""The whole of one forward pass, pixels to labels and vectors, as one module: what a compiler gets
to see.

Embeddings are caught by forward hooks on the vision tower and its blocks, so that the head's class
computes what it always computes and nothing runs twice. What nothing asks for is not computed:
blocks above the highest layer asked for, and in the last block all but the prefix tokens where only
they are read.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from vitray.models.blocks import ask_first_tokens_only, fuse_attention
from vitray.models.loading import Network
from vitray.schema import ModelSpec, ScoreFunction, VectorColumn

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,
}  # fp8: see fp8.py
WHOLE = (
    -1
)  # as k: the scores of all labels in their own order, for an engine that ranks them itself
LABELS_FROM_PREFIX = ("vit", "deit")  # the others' heads read all tokens, or may
POOLED_FROM_PREFIX = ("clip",)  # SigLIP's pooler reads all


def _scores(logits: Any, function: ScoreFunction) -> Any:
    """float32 [n, C] of logits float32 [n, C]."""
    if function is ScoreFunction.NONE:
        return logits
    return logits.sigmoid() if function is ScoreFunction.SIGMOID else logits.softmax(-1)


class Caught(threading.local):
    """What the hooks saw, by layer: float [n, T, D]. Several threads run one Forward, each with
    images of its own.
    """

    def __init__(self) -> None:
        self.tokens: dict[int | None, Any] = {}


class Forward(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Called with pixels uint8 [n, H, W, 3]; gives scores and ids [n, k], then one [n, D] a vector
    column.

    With k = WHOLE scores are [n, C] and ids are empty.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        vectors: list[VectorColumn],
        k: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.module, self.final_norm = network.module, network.final_norm
        self._spec, self._vectors, self._k, self._dtype = spec, vectors, k, DTYPES[spec.precision]
        pixels = spec.pixels
        # no buffers: they stay float32 when the weights do not
        self._mean, self._std = (
            torch.tensor(v, dtype=torch.float32, device=device) for v in (pixels.mean, pixels.std)
        )
        self.caught = Caught()
        self._read = (
            [*vectors, network.head.column]
            if k and network.head and network.head.column
            else vectors
        )
        self._leave_out_what_nobody_reads(network.blocks, network.head)
        for layer in {v.layer for v in self._read}:
            (network.tower if layer is None else network.blocks[layer - 1]).register_forward_hook(
                self._catch(layer)
            )
        self.eval().to(device, self._dtype)
        self.head = (
            None if network.head is None else network.head.to(device)
        )  # after that: it stays float32

    def _leave_out_what_nobody_reads(self, blocks: Any, head: Any | None) -> None:
        fuse_attention(blocks)
        layers = {v.layer for v in self._read}
        asks_tower = self._k and (head is None or head.column is None)
        depth = (
            len(blocks) if asks_tower or None in layers else max(layer for layer in layers if layer)
        )
        del blocks[depth:]
        cls_only = all(v.pool == "cls" for v in self._read if v.layer in (None, depth))
        family = self._spec.family
        prefix_labels = LABELS_FROM_PREFIX if head is None else POOLED_FROM_PREFIX
        readable = (
            family in prefix_labels if asks_tower else family != "beit"
        )  # whose blocks add a bias to pairs of tokens
        if blocks and cls_only and readable:
            ask_first_tokens_only(blocks[-1], self._spec.prefix_tokens)

    def _catch(self, layer: int | None) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            found = output.last_hidden_state if layer is None else output
            self.caught.tokens[layer] = found[0] if isinstance(found, tuple) else found

        return keep

    def forward(self, pixels: Any) -> list[Any]:
        answer = self.module(pixel_values=self._normalise(pixels))
        nothing = torch.empty(pixels.shape[0], 0)
        scores, ids = self._rank(self._logits(answer)) if self._k else (nothing, nothing)
        found = [scores, ids] + [self._vector(column) for column in self._vectors]
        self.caught.tokens.clear()
        return found

    def _normalise(self, pixels: Any) -> Any:
        """(x/255 - mean)/std in float32, in that order, then the precision: float [n, 3, H, W]."""
        rescale = self._spec.pixels.rescale
        x = pixels.float().div_(255) if rescale == 1 / 255 else pixels.float().mul_(rescale)
        x = x.sub_(self._mean).div_(self._std)
        return x.permute(0, 3, 1, 2).to(self._dtype).contiguous()

    def _logits(self, answer: Any) -> Any:
        """float32 [n, C]."""
        if self.head is None:
            return answer.logits.float()
        column = self.head.column
        return self.head(answer.pooler_output.float() if column is None else self._vector(column))

    def _rank(self, logits: Any) -> tuple[Any, Any]:
        every = _scores(logits, self._spec.score_function)
        if self._k == WHOLE:
            return every, every[:, :0]
        scores, ids = every.topk(self._k, dim=-1)
        return scores, ids

    def _vector(self, column: VectorColumn) -> Any:
        """One column's [n, D], pooled and normalised in float32."""
        tokens = self.caught.tokens[column.layer]
        if column.layer is None and self.final_norm is not None:
            tokens = self.final_norm(tokens)
        if column.pool == "cls":
            vector = tokens[:, 0].float()
        else:
            skipped = self._spec.prefix_tokens if column.pool == "patches_mean" else 0
            vector = tokens[:, skipped:].mean(1, dtype=torch.float32)
        if column.normalize:
            vector = torch.nn.functional.normalize(vector, dim=-1)
        return vector.to(torch.float16 if column.dtype == "float16" else torch.float32)
