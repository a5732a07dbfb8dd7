"""Loading a checkpoint with transformers: every weight comes from its safetensors, none is made up.

Imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vitray.errors import ModelError, one_line
from vitray.models.checkpoint import (
    Checkpoint,
    VisionConfig,
    head_shapes,
    quiet,
    read_config,
    read_labels,
)

VISION_TEXT = ("clip", "siglip")
WITH_POOLER = ("vit", "deit", "beit")
HEAD_WEIGHTS = ("classifier.weight", "classifier.bias")


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module and where its inner results appear.

    module: called as module(pixel_values=float [N, 3, H, W]); with a head its result has .logits.
    tower: the submodule, or the module itself, whose result has .last_hidden_state [N, T, D].
    blocks: the transformer's blocks in order, a ModuleList.
    final_norm: what the layer `last` still needs after the tower; None for most families.
    head: a forward.LinearHead that labels in place of the module; when it names no vector, the
    result has .pooler_output.
    """

    module: Any
    tower: Any
    blocks: Any
    final_norm: Any | None
    head: Any | None = None


def load_network(checkpoint: Checkpoint, labels: bool, head: Any | None = None) -> Network:
    """The checkpoint's module in float32 on the CPU.

    It has its own head if `labels` are needed and `head` does not give them.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = read_config(checkpoint)
    has_own_head = labels and head is None
    family = config.family.removesuffix("_vision_model")
    if has_own_head:
        suffix = "ForImageClassification"
    else:
        suffix = "VisionModel" if family in VISION_TEXT else "Model"
    name = MODEL_MAPPING_NAMES[family].removesuffix("Model") + suffix
    if has_own_head and "distillation_classifier.weight" in head_shapes(checkpoint):
        name += "WithTeacher"
    options: dict[str, Any] = {}
    if not has_own_head and family in WITH_POOLER:
        options["add_pooling_layer"] = False
    hf = config.hf if has_own_head else getattr(config.hf, "vision_config", config.hf)
    _set_pooler(family, hf, head is not None and head.column is None)
    module = load_weights(checkpoint, getattr(transformers, name), hf, **options)
    return _parts(module, config, head)


def load_trainable(
    checkpoint: Checkpoint, classes: Sequence[str], seed: int, scratch: bool
) -> Network:
    """The checkpoint's module in float32 on the CPU, with a head for these classes, to be trained.

    The head is the checkpoint's own if it has these classes in this order, else random.
    scratch: everything is random. Random numbers follow from the seed. Raises ModelError where
    other weights are missing, or have another shape than config.json says.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = read_config(checkpoint)
    family = config.family
    if family.endswith("_vision_model"):
        raise ModelError(
            f"{checkpoint.model} is a vision tower alone, for which transformers has no head. Take "
            f"the whole {family.removesuffix('_vision_model')}."
        )
    stem = MODEL_MAPPING_NAMES[family].removesuffix("Model")
    kind = getattr(transformers, f"{stem}ForImageClassification")
    keeps_head = not scratch and _has_head_for(checkpoint, config, classes)
    hf = config.hf
    hf.id2label = dict(enumerate(classes))
    hf.label2id = {name: n for n, name in enumerate(classes)}
    hf.problem_type = "single_label_classification"
    _set_pooler(family, hf, False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scratch:
            module = kind._from_config(hf, dtype=torch.float32, attn_implementation="sdpa")
        elif keeps_head:
            module = load_weights(checkpoint, kind, hf, ignore_mismatched_sizes=True)
        else:
            module = load_weights(checkpoint, kind, hf, HEAD_WEIGHTS, ignore_mismatched_sizes=True)
            _randomise_head(module, hf)
    return _parts(_without_cached_index(module), config)


def _has_head_for(checkpoint: Checkpoint, config: VisionConfig, classes: Sequence[str]) -> bool:
    return tuple(classes) == read_labels(checkpoint, config) and HEAD_WEIGHTS[0] in head_shapes(
        checkpoint
    )


def _randomise_head(module: Any, config: Any) -> None:
    """Also where the checkpoint's head fits: it may be for as many other classes."""
    deviation = config.initializer_range if hasattr(config, "initializer_range") else 0.02
    torch.nn.init.normal_(module.classifier.weight, std=deviation)
    torch.nn.init.zeros_(module.classifier.bias)


def _without_cached_index(module: Any) -> Any:
    """The module, without BEiT's index that all models of a process share.

    If it was made in inference mode, training cannot use it.
    """
    for part in module.modules():
        if (index := getattr(part, "generate_relative_position_index", None)) is not None:
            part.generate_relative_position_index = index.__wrapped__
    return module


def _set_pooler(family: str, config: Any, is_needed: bool) -> None:
    """SigLIP's attention pooler serves the text tower's labels, and some checkpoints lack it."""
    if family == "siglip":
        getattr(config, "vision_config", config).vision_use_head = is_needed


def _parts(module: Any, config: VisionConfig, head: Any | None = None) -> Network:
    family = config.family.removesuffix("_vision_model")
    tower = getattr(module, "vision_model" if family in VISION_TEXT else family, module)
    blocks = next(
        m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.layers
    )
    # CLIP gives its tokens before the norm that its pooler_output has seen
    return Network(module, tower, blocks, tower.post_layernorm if family == "clip" else None, head)


def load_weights(
    checkpoint: Checkpoint, kind: Any, config: Any, random: Sequence[str] = (), **options: Any
) -> Any:
    """The module, with every weight from the checkpoint but for those named in `random`.

    Raises ModelError for a head, a pooler or a block that transformers would initialise randomly.
    """
    try:
        with quiet():
            module, report = kind.from_pretrained(
                checkpoint.directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **options,
            )
    # transformers raises many kinds for a checkpoint that does not fit its config
    except Exception as error:
        reason = one_line(error, 300)
        raise ModelError(
            f"{checkpoint.model} cannot be loaded as {kind.__name__}: {reason}"
        ) from error
    _require_all_weights(checkpoint, kind.__name__, report, set(random))
    return module


def _require_all_weights(
    checkpoint: Checkpoint, kind: str, report: dict[str, Any], random: set[str]
) -> None:
    """Raise ModelError for missing weights. report: transformers' loading info."""
    mismatched = {
        str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]
    } - random
    if mismatched:
        raise ModelError(
            f"{checkpoint.model} has {len(mismatched)} weights of another shape than its "
            f"config.json says ({', '.join(sorted(mismatched)[:3])}). "
            "Take config.json and weights of one checkpoint."
        )
    # mask tokens are for pretraining only
    missing = {key for key in report["missing_keys"] if not key.endswith("mask_token")} - random
    if missing:
        hint = ", or labels: false" if "ForImage" in kind else ""
        raise ModelError(
            f"{checkpoint.model} lacks {len(missing)} weights that {kind} needs "
            f"({', '.join(sorted(missing)[:3])}); vitray does not make them up. "
            f"Choose a whole checkpoint{hint}."
        )
