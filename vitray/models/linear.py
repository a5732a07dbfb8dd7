"""A linear head over one vector of the forward pass: of labels that a text tower has read, or one
that was trained apart.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import transformers
from torch.nn.functional import linear, normalize

from vitray.errors import ModelError
from vitray.models import text
from vitray.models.checkpoint import Checkpoint, read_config
from vitray.models.labelling import head_column, read_own_head
from vitray.models.loading import load_weights
from vitray.schema import ModelSpec, VectorColumn


class LinearHead(torch.nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Logits float32 [n, C] of vectors float32 [n, D]. Its numbers stay float32 whatever the
    tower's are: CLIP multiplies a cosine by 100.

    column: the vector that it reads; None for the tower's own pooled one. projection: [E, D], after
    which the vector gets unit length.
    """

    def __init__(
        self, column: VectorColumn | None, weight: Any, bias: Any, projection: Any = None
    ) -> None:
        super().__init__()
        self.column = column
        self.weight, self.bias, self.projection = (
            None if values is None else torch.nn.Parameter(values, requires_grad=False)
            for values in (weight, bias, projection)
        )

    def forward(self, vectors: Any) -> Any:
        if self.column is None:
            vectors = normalize(
                vectors if self.projection is None else linear(vectors, self.projection), dim=-1
            )
        return linear(vectors, self.weight, self.bias)


def open_head(spec: ModelSpec, found: Checkpoint, device: str) -> LinearHead | None:
    """The head that the spec name, on the CPU; None for the checkpoint's own. Raises ModelError
    when it changed since.

    device: where labels are read.
    """
    if spec.prompts:
        return LinearHead(
            None,
            *_read_labels(
                spec.labels, spec.prompts, spec.text_sha256, spec.weights_sha256, found, device
            ),
        )
    if not spec.head:
        return None
    head = read_own_head(spec.head, spec)
    if head.sha256() != spec.head_sha256:
        raise ModelError(
            f"head {spec.head} changed since it was planned. Put the old one back, or choose "
            f"another `out`."
        )
    return LinearHead(
        head_column(head, spec), torch.from_numpy(head.weight), torch.from_numpy(head.bias)
    )


@lru_cache(
    maxsize=2
)  # `engine: auto` opens a model several times; a thousand labels in 80 prompts are 80,000 texts
def _read_labels(
    labels: tuple[str, ...],
    prompts: tuple[str, ...],
    text_sha256: str,
    weights_sha256: str,
    found: Checkpoint,
    device: str,
) -> tuple[Any, Any, Any]:
    """weight [C, E], bias [C] and projection [E, D] or None, so that the logits are the model's
    own.
    """
    config = read_config(found)
    texts = text.tokens(found, config, list(labels), list(prompts))
    if texts.sha256() != text_sha256:
        raise ModelError(
            f"{found.model}: its tokenizer changed since it was planned. Put the old one back, or "
            f"choose another `out`."
        )
    is_clip = config.family == "clip"
    whole = load_weights(
        found, transformers.CLIPModel if is_clip else transformers.SiglipModel, config.hf
    )
    vectors = text.embed(whole, texts, device)
    with torch.inference_mode(False), torch.no_grad():
        weight = vectors.clone() * whole.logit_scale.exp().cpu()
        bias = (
            torch.zeros(len(weight))
            if is_clip
            else whole.logit_bias.cpu().expand(len(weight)).clone()
        )
        return weight, bias, whole.visual_projection.weight.detach().cpu() if is_clip else None
