"""The text side of CLIP and SigLIP: labels in prompts, as tokens and as vectors. torch comes in
with `embed` alone.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitray.errors import ModelError, one_line
from vitray.models.checkpoint import Checkpoint, VisionConfig, quiet, tensor_shapes

FAMILIES = ("clip", "siglip")
VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
)  # any of these
# as transformers' zero-shot pipeline pads; SigLIP was trained so, and reads its last token
PADDING: dict[str, dict[str, Any]] = {
    "clip": {"padding": True},
    "siglip": {"padding": "max_length", "max_length": 64, "truncation": True},
}
TEXTS = 256  # embedded at a time


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the text tower reads: arrays int64 [C * P, T] by the name of its argument; all P prompts
    of a label together.
    """

    arrays: dict[str, np.ndarray]
    prompts: int

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, values in sorted(self.arrays.items()):
            digest.update(
                f"{name} {values.shape}".encode() + np.ascontiguousarray(values, np.int64).tobytes()
            )
        return digest.hexdigest()


def tokens(
    found: Checkpoint, config: VisionConfig, labels: list[str], prompts: list[str]
) -> Tokens:
    """Every label in every prompt. Raises ModelError without a text tower or a tokenizer, and for a
    text that is too long.
    """
    if config.family not in FAMILIES or not tensor_shapes(found, {"logit_scale"}):
        raise ModelError(
            f"{found.model} is a {config.family} model without a text tower, so it cannot read "
            f"`labels`. "
            "Choose a CLIP or SigLIP checkpoint, or labels: true or false."
        )
    texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
    arrays = _tokenised(found, config, texts)
    ids, tower = arrays["input_ids"], config.hf.text_config
    if ids.shape[1] > tower.max_position_embeddings:
        raise ModelError(
            f"{found.model} reads {tower.max_position_embeddings} tokens of a text, and there is "
            f"one of {ids.shape[1]}: make labels and "
            f"prompts shorter, such as {max(texts, key=len)[:80]!r}."
        )
    if ids.max() >= tower.vocab_size:
        raise ModelError(
            f"{found.model}: its tokenizer is another model's, its tokens go beyond the text "
            f"tower's {tower.vocab_size}."
        )
    return Tokens(arrays, len(prompts))


def _tokenised(found: Checkpoint, config: VisionConfig, texts: list[str]) -> dict[str, np.ndarray]:
    if not any(
        all(os.path.isfile(os.path.join(found.directory, name)) for name in names)
        for names in VOCABULARIES
    ):
        # transformers would make an empty CLIP tokenizer up
        raise ModelError(
            f"{found.model} holds no tokenizer "
            f"({', or '.join(' and '.join(names) for names in VOCABULARIES)}), so it cannot read "
            "`labels`. Copy it from the checkpoint it was made from."
        )
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                found.directory, trust_remote_code=False, local_files_only=True, config=config.hf
            )
            return dict(tokenizer(texts, return_tensors="np", **PADDING[config.family]))
    except ImportError as error:
        raise ModelError(
            f"{found.model}: its tokenizer needs SentencePiece: pip install 'vitray[siglip]'."
        ) from error
    except Exception as error:  # whatever a broken or foreign file makes transformers raise
        raise ModelError(
            f"{found.model}: its tokenizer does not work ({one_line(error)}). Fetch the "
            f"checkpoint again."
        ) from error


def embed(two_towers: Any, texts: Tokens, device: str) -> Any:
    """A unit vector a label, float32 [C, E] on the CPU. two_towers: transformers' CLIPModel or
    SiglipModel in float32.

    Of several prompts: the mean of their unit vectors, of unit length again (Radford et al. 2021,
    section 3.1.4).
    """
    import torch
    from torch.nn.functional import normalize

    parts, tower = [], two_towers.eval().to(device)
    with torch.inference_mode():
        for start in range(0, len(texts.arrays["input_ids"]), TEXTS):
            batch = {
                name: torch.from_numpy(a[start : start + TEXTS]).to(device)
                for name, a in texts.arrays.items()
            }
            parts.append(tower.get_text_features(**batch).pooler_output.cpu())
        vectors = normalize(torch.cat(parts), dim=-1)
        return normalize(vectors.unflatten(0, (-1, texts.prompts)).mean(1), dim=-1)
