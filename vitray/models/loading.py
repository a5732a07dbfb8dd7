"""Loading a checkpoint with transformers: every weight out of its safetensors, nothing made up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vitray.errors import ModelError
from vitray.models.checkpoint import Checkpoint, head_shapes, quiet, read_config

VISION_TEXT = ("clip", "siglip")
WITH_POOLER = ("vit", "deit", "beit")


@dataclass(frozen=True, slots=True)
class Network:
    """A torch module and where its inner results appear.

    module: called as module(pixel_values=float [N, 3, H, W]); with a head its answer has .logits.
    tower: the submodule (or module itself) whose answer has .last_hidden_state [N, T, D].
    blocks: the transformer's blocks in order, a ModuleList. final_norm: what `last` still needs after the tower, None for most families.
    head: a linear.LinearHead that labels instead of the module; where it names no vector, the answer has .pooler_output.
    """

    module: Any
    tower: Any
    blocks: Any
    final_norm: Any | None
    head: Any | None = None


def load_network(found: Checkpoint, labels: bool, head: Any | None = None) -> Network:
    """The checkpoint's module in float32 on the CPU, with its own head where there shall be labels and `head` does not give them."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    config, headed = read_config(found), labels and head is None
    family = config.family.removesuffix("_vision_model")
    hf = config.hf if headed else getattr(config.hf, "vision_config", config.hf)
    kind = "ForImageClassification" if headed else "VisionModel" if family in VISION_TEXT else "Model"
    name = MODEL_MAPPING_NAMES[family].removesuffix("Model") + kind
    if headed and "distillation_classifier.weight" in head_shapes(found):
        name += "WithTeacher"
    options = {"add_pooling_layer": False} if not headed and family in WITH_POOLER else {}
    if family == "siglip":  # its attention pooler serves the text tower's labels alone, and not every checkpoint has it
        getattr(hf, "vision_config", hf).vision_use_head = head is not None and head.column is None
    module = load_weights(found, getattr(transformers, name), hf, **options)
    tower = getattr(module, "vision_model" if family in VISION_TEXT else family, module)
    blocks = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.layers)
    # CLIP gives its tokens before the norm that its pooler_output has seen
    return Network(module, tower, blocks, tower.post_layernorm if family == "clip" else None, head)


def load_weights(found: Checkpoint, kind: Any, config: Any, **options: bool) -> Any:
    """The module with every weight out of the checkpoint: a random head, pooler or block raises ModelError."""
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
    except Exception as error:  # transformers raises many kinds for a checkpoint that does not fit its config
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{found.model} cannot be loaded as {kind.__name__}: {reason}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("mask_token"))  # masks belong to training
    if missing or report["mismatched_keys"]:
        lacks = missing or sorted(str(key) for key in report["mismatched_keys"])
        raise ModelError(
            f"{found.model} lacks {len(lacks)} weights that {kind.__name__} needs ({', '.join(lacks[:3])}); vitray does not make "
            "them up. Choose a whole checkpoint" + (", or labels: false." if "ForImage" in kind.__name__ else ".")
        )
    return module
