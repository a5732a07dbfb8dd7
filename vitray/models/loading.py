"""Loading a checkpoint with transformers: every weight out of its safetensors, nothing made up."""

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


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module and where its inner results appear.

    module: called as module(pixel_values=float [N, 3, H, W]); with a head its answer has .logits.
    tower: the submodule (or module itself) whose answer has .last_hidden_state [N, T, D].
    blocks: the transformer's blocks in order, a ModuleList. final_norm: what `last` still needs
    after the tower, None for most families.
    head: a linear.LinearHead that labels instead of the module; where it names no vector, the
    answer has .pooler_output.
    """

    module: Any
    tower: Any
    blocks: Any
    final_norm: Any | None
    head: Any | None = None


def load_network(found: Checkpoint, labels: bool, head: Any | None = None) -> Network:
    """The checkpoint's module in float32 on the CPU, with its own head where there shall be labels
    and `head` does not give them.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config, headed = read_config(found), labels and head is None
    family = config.family.removesuffix("_vision_model")
    hf = config.hf if headed else getattr(config.hf, "vision_config", config.hf)
    kind = (
        "ForImageClassification" if headed else "VisionModel" if family in VISION_TEXT else "Model"
    )
    name = MODEL_MAPPING_NAMES[family].removesuffix("Model") + kind
    if headed and "distillation_classifier.weight" in head_shapes(found):
        name += "WithTeacher"
    options: dict[str, Any] = (
        {"add_pooling_layer": False} if not headed and family in WITH_POOLER else {}
    )
    _with_pooler(family, hf, head is not None and head.column is None)
    return _parts(load_weights(found, getattr(transformers, name), hf, **options), config, head)


def load_trainable(found: Checkpoint, classes: Sequence[str], seed: int, scratch: bool) -> Network:
    """The checkpoint's module in float32 on the CPU with a head for these classes, to be trained.

    The head is the checkpoint's own where it has these classes in this order, else random; scratch:
    so is everything. Random numbers follow from the seed. Raises ModelError where other weights are
    missing, or of another shape than config.json says.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config = read_config(found)
    family = config.family
    if family.endswith("_vision_model"):
        raise ModelError(
            f"{found.model} is a vision tower alone, which transformers has no head for; take the "
            f"whole {family[:-13]}."
        )
    has_head = (
        not scratch
        and tuple(classes) == read_labels(found, config)
        and "classifier.weight" in head_shapes(found)
    )
    hf = config.hf
    hf.id2label, hf.label2id = dict(enumerate(classes)), {name: n for n, name in enumerate(classes)}
    hf.problem_type = "single_label_classification"
    _with_pooler(family, hf, False)
    kind = getattr(
        transformers, MODEL_MAPPING_NAMES[family].removesuffix("Model") + "ForImageClassification"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scratch:
            return _parts(
                _uncached(kind._from_config(hf, dtype=torch.float32, attn_implementation="sdpa")),
                config,
            )
        made_up = () if has_head else ("classifier.weight", "classifier.bias")
        module = load_weights(found, kind, hf, made_up, ignore_mismatched_sizes=True)
        if not has_head:  # of other classes, where their number is the same
            torch.nn.init.normal_(
                module.classifier.weight,
                std=hf.initializer_range if hasattr(hf, "initializer_range") else 0.02,
            )
            torch.nn.init.zeros_(module.classifier.bias)
    return _parts(_uncached(module), config)


def _uncached(module: Any) -> Any:
    """BEiT keeps an index for all models of a process, which is no good for training once it was
    made in inference mode.
    """
    for part in module.modules():
        if (index := getattr(part, "generate_relative_position_index", None)) is not None:
            part.generate_relative_position_index = index.__wrapped__
    return module


def _with_pooler(family: str, config: Any, wanted: bool) -> None:
    if (
        family == "siglip"
    ):  # its attention pooler serves the text tower's labels alone, and not every checkpoint has it
        getattr(config, "vision_config", config).vision_use_head = wanted


def _parts(module: Any, config: VisionConfig, head: Any | None = None) -> Network:
    family = config.family.removesuffix("_vision_model")
    tower = getattr(module, "vision_model" if family in VISION_TEXT else family, module)
    blocks = next(
        m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.layers
    )
    # CLIP gives its tokens before the norm that its pooler_output has seen
    return Network(module, tower, blocks, tower.post_layernorm if family == "clip" else None, head)


def load_weights(
    found: Checkpoint, kind: Any, config: Any, made_up: Sequence[str] = (), **options: Any
) -> Any:
    """The module with every weight out of the checkpoint: a random head, pooler or block raises
    ModelError, but for those `made_up`.
    """
    try:
        with quiet():
            module, report = kind.from_pretrained(
                found.directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **options,
            )
    except (
        Exception
    ) as error:  # transformers raises many kinds for a checkpoint that does not fit its config
        reason = one_line(error, 300)
        raise ModelError(f"{found.model} cannot be loaded as {kind.__name__}: {reason}") from error
    missing = {key for key in report["missing_keys"] if not key.endswith("mask_token")} - set(
        made_up
    )  # masks: of pretraining
    other = {
        str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]
    } - set(made_up)
    if other:
        raise ModelError(
            f"{found.model} has {len(other)} weights of another shape than its config.json says "
            f"({', '.join(sorted(other)[:3])}). "
            "Take config.json and weights of one checkpoint."
        )
    if missing:
        lacks = sorted(missing)
        raise ModelError(
            f"{found.model} lacks {len(lacks)} weights that {kind.__name__} needs "
            f"({', '.join(lacks[:3])}); vitray does not make "
            "them up. Choose a whole checkpoint"
            + (", or labels: false." if "ForImage" in kind.__name__ else ".")
        )
    return module
