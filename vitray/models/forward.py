"""The whole forward pass, from pixels to labels and vectors, as one module that compilers can see.

Forward hooks on the vision tower and its blocks catch the embeddings, so the head's class computes
as always and nothing runs twice. What nothing reads is not computed:

- blocks above the highest layer that is read;
- in the last block, all but the prefix tokens, where only those are read.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.nn.functional import linear, normalize

from vitray.models.blocks import fuse_attention, limit_to_first_tokens
from vitray.models.checkpoint import Checkpoint
from vitray.models.labels import Words, text_weights
from vitray.models.linear_head import read_planned_head
from vitray.models.loading import Network
from vitray.schema import ModelOutputs, ModelSpec, ScoreFunction, VectorColumn

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.bfloat16,  # see blocks.py
}
LABELS_FROM_PREFIX = ("vit", "deit")  # heads of the other families read all tokens, or may
POOLED_FROM_PREFIX = ("clip",)  # SigLIP's pooler reads all tokens


# ---------------------------------------------------------------- the forward pass


class Caught(threading.local):
    """What the hooks caught, by layer: float [n, T, D].

    Several threads run one Forward, each with images of its own.
    """

    def __init__(self) -> None:
        self.tokens: dict[int | None, Any] = {}


class Forward(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Called with pixels uint8 [n, H, W, 3]; gives scores and ids [n, k], then [n, D] per vector.

    ranks: False gives the scores of all labels in their own order, [n, C], and no ids; then the
    engine ranks them itself.
    """

    def __init__(
        self,
        network: Network,
        spec: ModelSpec,
        outputs: ModelOutputs,
        device: torch.device,
        ranks: bool = True,
    ) -> None:
        super().__init__()
        self.module = network.module
        self.final_norm = network.final_norm
        self._spec = spec
        self._outputs = outputs
        self._ranks = ranks
        self._dtype = DTYPES[spec.precision]
        # not buffers: they stay float32 when the weights do not
        self._mean = torch.tensor(spec.pixels.mean, dtype=torch.float32, device=device)
        self._std = torch.tensor(spec.pixels.std, dtype=torch.float32, device=device)
        self.caught = Caught()
        self._columns = list(outputs.vectors)
        if outputs.top_k and network.head and network.head.column:
            self._columns.append(network.head.column)
        self._drop_unread(network.blocks, network.head)
        for layer in {column.layer for column in self._columns}:
            module = network.tower if layer is None else network.blocks[layer - 1]
            module.register_forward_hook(self._catch(layer))
        self.eval().to(device, self._dtype)
        # after the conversion: the head stays float32
        self.head = None if network.head is None else network.head.to(device)

    def _drop_unread(self, blocks: Any, head: LinearHead | None) -> None:
        """Remove what no label and no vector needs."""
        fuse_attention(blocks)
        layers = {column.layer for column in self._columns}
        reads_tower = self._outputs.top_k and (head is None or head.column is None)
        if reads_tower or None in layers:
            depth = len(blocks)
        else:
            depth = max(layer for layer in layers if layer)
        del blocks[depth:]
        cls_only = all(c.pool == "cls" for c in self._columns if c.layer in (None, depth))
        family = self._spec.family
        if reads_tower:
            is_prefix_enough = family in (
                LABELS_FROM_PREFIX if head is None else POOLED_FROM_PREFIX
            )
        else:
            is_prefix_enough = family != "beit"  # its blocks add a bias to pairs of tokens
        if blocks and cls_only and is_prefix_enough:
            limit_to_first_tokens(blocks[-1], self._spec.prefix_tokens)

    def _catch(self, layer: int | None) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            tokens = output.last_hidden_state if layer is None else output
            self.caught.tokens[layer] = tokens[0] if isinstance(tokens, tuple) else tokens

        return keep

    def forward(self, pixels: Any) -> list[Any]:
        result = self.module(pixel_values=self._normalise(pixels))
        scores = ids = torch.empty(pixels.shape[0], 0)
        if self._outputs.top_k:
            scores, ids = self._rank(self._logits(result))
        vectors = [self._vector(column) for column in self._outputs.vectors]
        self.caught.tokens.clear()
        return [scores, ids, *vectors]

    def _normalise(self, pixels: Any) -> Any:
        """(x/255 - mean)/std in float32, in that order, then the precision: float [n, 3, H, W]."""
        rescale = self._spec.pixels.rescale
        x = pixels.float().div_(255) if rescale == 1 / 255 else pixels.float().mul_(rescale)
        x = x.sub_(self._mean).div_(self._std)
        return x.permute(0, 3, 1, 2).to(self._dtype).contiguous()

    def _logits(self, result: Any) -> Any:
        """float32 [n, C]."""
        if self.head is None:
            return result.logits.float()
        column = self.head.column
        return self.head(result.pooler_output.float() if column is None else self._vector(column))

    def _rank(self, logits: Any) -> tuple[Any, Any]:
        scores = _scores(logits, self._spec.score_function)
        if not self._ranks:
            return scores, scores[:, :0]
        best, ids = scores.topk(self._outputs.top_k, dim=-1)
        return best, ids

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
            vector = normalize(vector, dim=-1)
        return vector.to(torch.float16 if column.dtype == "float16" else torch.float32)


def _scores(logits: Any, function: ScoreFunction) -> Any:
    """float32 [n, C] of logits float32 [n, C]."""
    if function is ScoreFunction.NONE:
        return logits
    return logits.sigmoid() if function is ScoreFunction.SIGMOID else logits.softmax(-1)


# ---------------------------------------------------------------- a linear head over one vector


class LinearHead(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Logits float32 [n, C] of vectors float32 [n, D].

    Its numbers stay float32 with any precision of the tower: CLIP multiplies a cosine by 100.
    column: the vector that it reads; None for the tower's own pooled one, which then gets unit
    length. projection: [E, D] or None, applied to that pooled vector first.
    """

    def __init__(
        self, column: VectorColumn | None, weight: Any, bias: Any, projection: Any = None
    ) -> None:
        super().__init__()
        self.column = column
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self.projection = None
        if projection is not None:
            self.projection = torch.nn.Parameter(projection, requires_grad=False)

    def forward(self, vectors: Any) -> Any:
        if self.column is None:
            if self.projection is not None:
                vectors = linear(vectors, self.projection)
            vectors = normalize(vectors, dim=-1)
        return linear(vectors, self.weight, self.bias)


def open_head(spec: ModelSpec, checkpoint: Checkpoint, device: str) -> LinearHead | None:
    """The head that the spec names, on the CPU; None for the checkpoint's own.

    device: where a text tower reads the labels. Raises ModelError when the head changed since.
    """
    if spec.prompts:
        words = Words(spec.labels, spec.prompts, spec.text_sha256, spec.weights_sha256)
        weight, bias, projection = text_weights(checkpoint, words, device)
        return LinearHead(None, weight, bias, projection)
    if not spec.head:
        return None
    head = read_planned_head(spec)
    return LinearHead(head.column(), torch.from_numpy(head.weight), torch.from_numpy(head.bias))
