"""Labels: a file of names, the checkpoint's own head, and words that its text tower reads.

Loads torch in `text_weights` alone. For a linear head of your own, see linear_head.py.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from vitray.errors import JobError, ModelError, VitrayError, count, one_line
from vitray.job import distinct_labels
from vitray.models.checkpoint import (
    Checkpoint,
    VisionConfig,
    quiet,
    read_config,
    read_labels,
    tensor_shapes,
)
from vitray.schema import ModelSpec, ScoreFunction
from vitray.storage import absolute, read

WITH_TEXT_TOWER = ("clip", "siglip")  # families
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))  # any of them
# Pads as transformers' zero-shot pipeline does. SigLIP was trained so, and reads its last token.
PADDING: dict[str, dict[str, Any]] = {
    "clip": {"padding": True},
    "siglip": {"padding": "max_length", "max_length": 64, "truncation": True},
}
TEXTS = 256  # embedded at a time


def read_label_names(path: str) -> list[str]:
    """The labels of a UTF-8 file with one on each line.

    Raises JobError when the file cannot be read or has a label twice.
    """
    url = absolute(path)
    try:
        return distinct_labels(read(url).decode("utf-8-sig").strip().splitlines())
    except (VitrayError, OSError) as error:
        raise JobError(
            f"`labels`: {url} cannot be read ({one_line(error)}); "
            "for labels in the job write [cat, dog]."
        ) from error
    except ValueError as error:
        raise JobError(
            f"`labels`: {url}: {one_line(error)}; write one label per line, in UTF-8."
        ) from error


# ---------------------------------------------------------------- the checkpoint's own head


def labelled_by_own_head(
    spec: ModelSpec, checkpoint: Checkpoint, config: VisionConfig
) -> ModelSpec:
    """The spec with the labels of the checkpoint's head. Raises ModelError when it has no head."""
    labels = read_labels(checkpoint, config)
    if not labels:
        hint = ""
        if config.family in WITH_TEXT_TOWER:
            hint = " It can label with words that you give: labels: [cat, dog]."
        raise ModelError(
            f"{checkpoint.model} has no trained classification head, so it cannot label. Set "
            f"labels: false to keep embeddings only, or choose a checkpoint with a head.{hint}"
        )
    is_regression = config.score_function is ScoreFunction.NONE
    return replace(spec, labels=labels, multi_label=config.multi_label, regression=is_regression)


# ---------------------------------------------------------------- words for a text tower


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the text tower reads: every label in every prompt.

    arrays: int64 [C * P, T] by the name of the tower's argument; the P prompts of a label follow
    one another.
    """

    arrays: dict[str, np.ndarray]
    prompts: int

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, values in sorted(self.arrays.items()):
            digest.update(f"{name} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values, np.int64).tobytes())
        return digest.hexdigest()


def labelled_by_words(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    config: VisionConfig,
    labels: list[str],
    prompts: list[str],
) -> ModelSpec:
    """The spec with labels that the text tower reads. Raises what `tokenise` raises."""
    tokens = tokenise(checkpoint, config, labels, prompts)
    return replace(
        spec,
        labels=tuple(labels),
        multi_label=config.family == "siglip",
        prompts=tuple(prompts),
        text_sha256=tokens.sha256(),
    )


def tokenise(
    checkpoint: Checkpoint, config: VisionConfig, labels: list[str], prompts: list[str]
) -> Tokens:
    """The tokens of every label in every prompt.

    Raises ModelError without a text tower or a tokenizer, and for a text that is too long.
    """
    if config.family not in WITH_TEXT_TOWER or not tensor_shapes(checkpoint, {"logit_scale"}):
        raise ModelError(
            f"{checkpoint.model} is a {config.family} model without a text tower, "
            "so it cannot read `labels`. "
            "Choose a CLIP or SigLIP checkpoint, or labels: true or false."
        )
    texts = [prompt.replace("{}", label) for label in labels for prompt in prompts]
    arrays = _tokenise_texts(checkpoint, config, texts)
    ids, tower = arrays["input_ids"], config.hf.text_config
    if ids.shape[1] > tower.max_position_embeddings:
        raise ModelError(
            f"{checkpoint.model} reads {count(tower.max_position_embeddings, 'token')} of a text, "
            f"and one has {ids.shape[1]}. Make labels and prompts shorter, such as "
            f"{max(texts, key=len)[:80]!r}."
        )
    if ids.max() >= tower.vocab_size:
        raise ModelError(
            f"{checkpoint.model}: its tokenizer belongs to another model, because its tokens "
            f"exceed the text tower's {tower.vocab_size}. Fetch the checkpoint again."
        )
    return Tokens(arrays, len(prompts))


def _tokenise_texts(
    checkpoint: Checkpoint, config: VisionConfig, texts: list[str]
) -> dict[str, np.ndarray]:
    _require_vocabulary(checkpoint)
    from transformers import AutoTokenizer

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                checkpoint.directory,
                trust_remote_code=False,
                local_files_only=True,
                config=config.hf,
            )
            return dict(tokenizer(texts, return_tensors="np", **PADDING[config.family]))
    except ImportError as error:
        raise ModelError(
            f"{checkpoint.model}: its tokenizer needs SentencePiece: pip install 'vitray[siglip]'."
        ) from error
    except Exception as error:  # transformers raises many kinds for a broken or foreign file
        raise ModelError(
            f"{checkpoint.model}: its tokenizer does not work ({one_line(error)}). "
            "Fetch the checkpoint again."
        ) from error


def _require_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise ModelError without one: transformers would make up an empty CLIP tokenizer."""
    present = set(os.listdir(checkpoint.directory))
    if not any(present.issuperset(names) for names in VOCABULARIES):
        choices = ", or ".join(" and ".join(names) for names in VOCABULARIES)
        raise ModelError(
            f"{checkpoint.model} holds no tokenizer ({choices}), so it cannot read `labels`. "
            "Copy it from the checkpoint it was made from."
        )


@dataclass(frozen=True, slots=True)
class Words:
    """Labels for a text tower, with the hashes of its tokens and of the weights that read them."""

    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    text_sha256: str
    weights_sha256: str


# Cached because `engine: auto` opens a model several times. A thousand labels in 80 prompts are
# 80,000 texts.
@lru_cache(maxsize=2)
def text_weights(checkpoint: Checkpoint, words: Words, device: str) -> tuple[Any, Any, Any]:
    """weight [C, E], bias [C], and projection [E, D] or None, that give the model's own logits.

    Computed on `device`, returned on the CPU. Raises ModelError when the tokenizer changed.
    """
    import torch
    import transformers

    from vitray.models.loading import load_weights

    config = read_config(checkpoint)
    tokens = tokenise(checkpoint, config, list(words.labels), list(words.prompts))
    if tokens.sha256() != words.text_sha256:
        raise ModelError(
            f"{checkpoint.model}: its tokenizer changed since it was planned. "
            "Put the old one back, or choose another `out`."
        )
    is_clip = config.family == "clip"
    kind = transformers.CLIPModel if is_clip else transformers.SiglipModel
    two_towers = load_weights(checkpoint, kind, config.hf)
    vectors = _embed(two_towers, tokens, device)
    with torch.inference_mode(False), torch.no_grad():
        weight = vectors.clone() * two_towers.logit_scale.exp().cpu()
        if is_clip:
            projection = two_towers.visual_projection.weight.detach().cpu()
            return weight, torch.zeros(len(weight)), projection
        return weight, two_towers.logit_bias.cpu().expand(len(weight)).clone(), None


def _embed(two_towers: Any, tokens: Tokens, device: str) -> Any:
    """One unit vector for each label, float32 [C, E] on the CPU.

    Several prompts give the mean of their unit vectors, at unit length again (Radford et al. 2021,
    section 3.1.4). two_towers: transformers' CLIPModel or SiglipModel in float32.
    """
    import torch
    from torch.nn.functional import normalize

    tower = two_towers.eval().to(device)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens.arrays["input_ids"]), TEXTS):
            batch = {
                name: torch.from_numpy(values[start : start + TEXTS]).to(device)
                for name, values in tokens.arrays.items()
            }
            parts.append(tower.get_text_features(**batch).pooler_output.cpu())
        vectors = normalize(torch.cat(parts), dim=-1)
        return normalize(vectors.unflatten(0, (-1, tokens.prompts)).mean(1), dim=-1)
