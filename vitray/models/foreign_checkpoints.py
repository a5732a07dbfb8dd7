"""What a directory of another library is, so that an error can name the next step.

Pure functions: each returns the rest of a sentence about the model, or None when it is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from vitray.errors import shortened

# Files that other libraries write beside their weights. Their text is data and only ever quoted.
ADAPTER = "adapter_config.json"
SIGNATURE_FILES = (ADAPTER, "model_index.json", "modules.json", "open_clip_config.json")
ENCODERS = (".CLIPModel", ".Transformer")  # types in modules.json whose folder is a checkpoint
GGUF = (".gguf",)
GRAPHS = (".onnx", "openvino_model.xml", ".tflite", ".mlmodel", ".engine")
OTHER_WEIGHTS = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".h5", ".keras", ".msgpack", ".npz", ".pb")


def describe_directory(names: Collection[str], documents: Mapping[str, Any]) -> str | None:
    """What a directory without config.json is.

    names: its files. documents: the parsed content of those of SIGNATURE_FILES that it has.
    """
    if ADAPTER in names:
        return describe_adapter(documents.get(ADAPTER))
    if "model_index.json" in names:
        return _describe_diffusers(documents.get("model_index.json"))
    if "modules.json" in names:
        return _describe_sentence_transformers(documents.get("modules.json"))
    if "open_clip_config.json" in names:
        return (
            "is an OpenCLIP checkpoint, and vitray reads checkpoints of transformers. "
            "Use the transformers version of the same weights (model_type clip in its "
            "config.json), or convert it."
        )
    return describe_weights(names)


def describe_config(config: Mapping[str, Any]) -> str | None:
    """Which other library wrote a config.json."""
    model_type = config.get("model_type")
    is_timm = "pretrained_cfg" in config or ("architecture" in config and model_type is None)
    if not is_timm and model_type != "timm_wrapper":
        return None
    architecture = config.get("architecture")
    name = f" ({_quoted(architecture)})" if isinstance(architecture, str) else ""
    return (
        f"is a timm checkpoint{name}, and vitray reads checkpoints of transformers. "
        "Use the transformers version of the same weights, such as google/vit-base-patch16-224 "
        "for timm's vit_base_patch16_224, or convert it."
    )


def describe_adapter(document: Any) -> str:
    """What a PEFT adapter is. document: its adapter_config.json."""
    base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
    name = f" for {_quoted(base)}" if isinstance(base, str) and base else ""
    return (
        f"is a PEFT adapter{name}, not a whole model. Merge it into its base model "
        "(peft: merge_and_unload, then save_pretrained), and give the directory of the result."
    )


def describe_weights(names: Collection[str]) -> str | None:
    """What a directory is, by the suffixes of its files."""
    if file := _first(names, GGUF):
        return (
            f"holds GGUF weights ({file}), which vitray does not read. Give the checkpoint of "
            "transformers that they were made from: a directory with config.json and "
            "model.safetensors."
        )
    if _first(names, (".safetensors",)):
        return None
    if file := _first(names, GRAPHS):
        return (
            f"holds {file}, a graph that vitray export-model did not write. "
            "Give the checkpoint it was made from, or export that checkpoint (vitray export-model)."
        )
    if file := _first(names, OTHER_WEIGHTS):
        return (
            f"holds {file} and no config.json, so nothing says which network the weights belong "
            "to, and files such as .bin and .pth can run code. "
            "Load them in the code that wrote them, save the model as a checkpoint of transformers "
            "(save_pretrained), and give that directory."
        )
    return None


def _describe_diffusers(document: Any) -> str:
    kind = document.get("_class_name") if isinstance(document, dict) else None
    name = f" ({_quoted(kind)})" if isinstance(kind, str) else ""
    return (
        f"is a diffusers pipeline{name}, which generates images; vitray labels and embeds them. "
        "Choose a vision transformer, such as openai/clip-vit-base-patch32."
    )


def _describe_sentence_transformers(document: Any) -> str:
    source = "the one it was made from"
    for module in document if isinstance(document, list) else []:
        path = module.get("path") if isinstance(module, dict) else None
        if isinstance(path, str) and path and str(module.get("type")).endswith(ENCODERS):
            source = f"its folder {_quoted(path)}, as a local directory"
            break
    return (
        "is a sentence-transformers model, and vitray reads checkpoints of transformers. "
        f"If it takes images, give the checkpoint that it wraps: {source}."
    )


def _first(names: Collection[str], suffixes: tuple[str, ...]) -> str | None:
    matches = sorted(name for name in names if name.lower().endswith(suffixes))
    return _quoted(matches[0]) if matches else None


def _quoted(text: str) -> str:
    """Text of a foreign file, short and on one line."""
    return shortened("".join(c if c.isprintable() else "?" for c in text), 80)
