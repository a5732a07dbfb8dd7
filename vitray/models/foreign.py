"""Recognises model directories of other libraries, so that a refusal says what to do. Pure: reads
no file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vitray.errors import shortened

# Files that other libraries write beside their weights. Their text is data: it is only ever quoted.
ADAPTER = "adapter_config.json"
SIGNS = (ADAPTER, "model_index.json", "modules.json", "open_clip_config.json")

ENCODERS = (".CLIPModel", ".Transformer")  # types in modules.json whose folder is a checkpoint

GGUF = (".gguf",)
GRAPHS = (".onnx", "openvino_model.xml", ".tflite", ".mlmodel", ".engine")
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".keras", ".msgpack", ".npz", ".pb")


def of_directory(names: Collection[str], documents: Mapping[str, Any]) -> str | None:
    """What a directory without config.json is, as the rest of a sentence about it; None when
    unknown.

    names: its files. documents: the parsed content of those of SIGNS that are JSON.
    """
    if ADAPTER in names:
        return of_adapter(documents.get(ADAPTER))
    if "model_index.json" in names:
        return _of_diffusers(documents.get("model_index.json"))
    if "modules.json" in names:
        return _of_sentence_transformers(documents.get("modules.json"))
    if "open_clip_config.json" in names:
        return (
            "is an OpenCLIP checkpoint, and vitray reads checkpoints of transformers. "
            "Use the transformers version of the same weights (model_type clip in its "
            "config.json), "
            "or convert it."
        )
    return of_weights(names)


def of_config(config: Mapping[str, Any]) -> str | None:
    """Whose config.json it is, if not of transformers, as the rest of a sentence; None when
    unknown.
    """
    model_type = config.get("model_type")
    is_timm = "pretrained_cfg" in config or ("architecture" in config and model_type is None)
    if not is_timm and model_type != "timm_wrapper":
        return None
    architecture = config.get("architecture")
    named = f" ({_quoted(architecture)})" if isinstance(architecture, str) else ""
    return (
        f"is a timm checkpoint{named}, and vitray reads checkpoints of transformers. "
        "Use the transformers version of the same weights, such as google/vit-base-patch16-224 "
        "for timm's vit_base_patch16_224, or convert it."
    )


def of_adapter(document: Any) -> str:
    """What a PEFT adapter is, as the rest of a sentence. document: its adapter_config.json."""
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    named = f" for {_quoted(base)}" if isinstance(base, str) and base else ""
    return (
        f"is a PEFT adapter{named}, not a whole model. Merge it into its base model "
        "(peft: merge_and_unload, then save_pretrained), and give the directory of the result."
    )


def of_weights(names: Collection[str]) -> str | None:
    """What a directory is by the suffixes of its files, as the rest of a sentence; None when
    unknown.
    """
    if found := _first(names, GGUF):
        return (
            f"holds GGUF weights ({found}), which vitray does not read. Give the checkpoint of "
            "transformers that they were made from: a directory with config.json and "
            "model.safetensors."
        )
    if _first(names, (".safetensors",)):
        return None
    if found := _first(names, GRAPHS):
        return (
            f"holds {found}, a graph that vitray export did not write. Give the checkpoint of "
            "transformers that it was made from, or export that (vitray export)."
        )
    if found := _first(names, OTHER_WEIGHTS):
        return (
            f"holds {found} and no config.json, so nothing says which network the weights belong "
            f"to, "
            "and files such as .bin and .pth can run code. Load them in the code that wrote them, "
            "save the model as a checkpoint of transformers (save_pretrained), and give that "
            "directory."
        )
    return None


def _of_diffusers(document: Any) -> str:
    kind = document.get("_class_name") if isinstance(document, dict) else None
    named = f" ({_quoted(kind)})" if isinstance(kind, str) else ""
    return (
        f"is a diffusers pipeline{named}, which generates images; vitray labels and embeds them. "
        "Choose a vision transformer, such as openai/clip-vit-base-patch32."
    )


def _of_sentence_transformers(document: Any) -> str:
    where = "the one it was made from"
    for module in document if isinstance(document, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path and str(module.get("type")).endswith(ENCODERS):
            where = f"its folder {_quoted(path)}, as a local directory"
            break
    return (
        "is a sentence-transformers model, and vitray reads checkpoints of transformers. "
        f"If it takes images, give the checkpoint that it wraps: {where}."
    )


def _first(names: Collection[str], suffixes: tuple[str, ...]) -> str | None:
    found = sorted(name for name in names if name.lower().endswith(suffixes))
    return _quoted(found[0]) if found else None


def _quoted(text: str) -> str:
    """Text of a foreign file, short and on one line."""
    return shortened("".join(c if c.isprintable() else "?" for c in text), 80)
