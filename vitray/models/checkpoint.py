"""What the files of a checkpoint contain: its config, its labels and its weights.

Needs no torch, and executes nothing of a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitray.errors import ModelError, count, one_line
from vitray.models.foreign_checkpoints import (
    ADAPTER,
    SIGNATURE_FILES,
    describe_adapter,
    describe_config,
    describe_directory,
)
from vitray.schema import ScoreFunction

# tokens before the patches: CLS, DeiT's distillation token; read_config adds registers
FAMILIES = {
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "beit": 1,
    "clip": 1,
    "clip_vision_model": 1,
    "siglip": 0,
    "siglip_vision_model": 0,
}
HEADS = (("classifier.weight",), ("cls_classifier.weight", "distillation_classifier.weight"))
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
# `vitray export-model` writes this file and these graph files: see exported.py
EXPORT = "vitray_export.json"
GRAPH_FILES = ("model.onnx", "model.onnx.data", "openvino_model.xml", "openvino_model.bin")
# by the prefix of their weights
WRAPPERS = {"_orig_mod.": "a compiled module", "module.": "a DataParallel module"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory on this machine.

    model: its name for people and for other nodes. revision: a commit of the hub, else None.
    """

    model: str
    revision: str | None
    directory: str


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """What config.json says about the vision tower.

    hf: the transformers config object of the whole checkpoint.
    """

    family: str
    dimension: int
    layers: int
    prefix_tokens: int
    image_size: tuple[int, int]
    patch_size: int
    score_function: ScoreFunction
    hf: Any

    @property
    def multi_label(self) -> bool:
        """Whether scores of the checkpoint's own head are independent, so their sum is not 1."""
        return self.score_function is not ScoreFunction.SOFTMAX

    def class_names(self) -> dict[int, str]:
        """The names of the head's outputs, by their number."""
        return {int(i): str(name) for i, name in self.hf.id2label.items()}


# ---------------------------------------------------------------- its config


def read_config(checkpoint: Checkpoint) -> VisionConfig:
    """config.json, read by transformers' own class of that model_type; `auto_map` is ignored."""
    fields = config_fields(checkpoint)
    family = fields["model_type"]
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family].from_dict(fields)
        vision = getattr(config, "vision_config", config)
        registers = int(getattr(vision, "num_register_tokens", 0))
        patch = vision.patch_size
        spec = VisionConfig(
            family=family,
            dimension=int(vision.hidden_size),
            layers=int(vision.num_hidden_layers),
            prefix_tokens=FAMILIES[family] + registers,
            image_size=_sides(vision.image_size),
            patch_size=int(patch[0] if isinstance(patch, (list, tuple)) else patch),
            score_function=score_function_of(config),
            hf=config,
        )
    except Exception as error:  # strict dataclasses raise their own kinds
        raise ModelError(
            f"{checkpoint.model}: config.json is not a valid {family} config ({one_line(error)})."
        ) from error
    if vision.num_channels != 3:
        raise ModelError(
            f"{checkpoint.model} takes images of {vision.num_channels} channels; vitray feeds RGB."
        )
    return spec


def config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a family that vitray knows. Raises ModelError for any other."""
    has_config = os.path.isfile(os.path.join(checkpoint.directory, "config.json"))
    if not has_config and (problem := _other_library(checkpoint)):
        raise ModelError(f"{checkpoint.model} {problem}")
    fields = read_json(checkpoint, "config.json")
    family = fields.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        problem = describe_config(fields)
        if problem is None and family is None:
            problem = _other_library(checkpoint)
        if problem:
            raise ModelError(f"{checkpoint.model} {problem}")
        families = f"Known: {', '.join(FAMILIES)}."
        if family is None:
            raise ModelError(
                f"{checkpoint.model}: config.json names no model_type, so it is not a checkpoint "
                f"of transformers. {families}"
            )
        raise ModelError(
            f"{checkpoint.model} is of model type {family}, which vitray does not know. {families}"
        )
    fields.pop("auto_map", None)
    if isinstance(fields.get("id2label"), list):  # names in the order of the head's outputs
        fields["id2label"] = dict(enumerate(fields["id2label"]))
    return fields


def _sides(size: Any) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    if isinstance(size, (list, tuple)):
        return int(size[0]), int(size[1])
    return int(size), int(size)


def _other_library(checkpoint: Checkpoint) -> str | None:
    """Which other library wrote the directory; see the functions `describe_…`."""
    try:
        names = os.listdir(checkpoint.directory)
    except OSError:  # reading its files will report that
        return None
    documents = {
        name: _read_any_json(checkpoint, name) for name in SIGNATURE_FILES if name in names
    }
    return describe_directory(names, documents)


def score_function_of(config: Any) -> ScoreFunction:
    """How transformers' pipeline makes scores: 5.23, ImageClassificationPipeline.postprocess."""
    if config.problem_type == "regression":
        return ScoreFunction.NONE
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return ScoreFunction.SIGMOID
    return ScoreFunction.SOFTMAX


def read_labels(checkpoint: Checkpoint, config: VisionConfig) -> tuple[str, ...]:
    """Class names in the order of the head's outputs; empty without a trained head."""
    shapes = head_shapes(checkpoint)
    head = next((names for names in HEADS if shapes.keys() >= set(names)), None)
    if head is None or config.family.endswith("_vision_model"):
        return ()
    names = config.class_names()
    outputs = shapes[head[0]][0]
    if sorted(names) != list(range(outputs)):
        raise ModelError(
            f"{checkpoint.model}: config.json names {count(len(names), 'class')}, but the head has "
            f"{outputs}. Repair id2label."
        )
    return tuple(names[i] for i in range(outputs))


# ---------------------------------------------------------------- its weights


def head_shapes(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """The shapes of the classification heads in the weights, by name."""
    return tensor_shapes(checkpoint, {name for names in HEADS for name in names})


def tensor_shapes(checkpoint: Checkpoint, names: set[str]) -> dict[str, list[int]]:
    """The shapes of those of the names that the weights have; reads only the files' headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in weight_files(checkpoint):
        try:
            with safe_open(path, framework="np") as tensors:
                stored_names = list(tensors.keys())
                _require_plain_names(checkpoint, stored_names)
                shapes |= {
                    name: tensors.get_slice(name).get_shape()
                    for name in names.intersection(stored_names)
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{checkpoint.model}: {os.path.basename(path)} is damaged ({one_line(error)}). "
                "Fetch it again."
            ) from error
    return shapes


def _require_plain_names(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise ModelError for weights that were saved from a wrapper, whose names have its prefix."""
    for prefix, wrapper in WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            raise ModelError(
                f"{checkpoint.model}: every weight's name begins with `{prefix}`, because "
                f"{wrapper} was saved. Save the model inside it: unwrap it, then save_pretrained."
            )


def weight_files(checkpoint: Checkpoint) -> list[str]:
    """The safetensors files that transformers will load, sorted by name.

    Raises ModelError when there are none.
    """
    single = os.path.join(checkpoint.directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    if os.path.isfile(f"{single}.index.json"):
        return _indexed_files(checkpoint)
    if os.path.isfile(os.path.join(checkpoint.directory, ADAPTER)):
        raise ModelError(
            f"{checkpoint.model} {describe_adapter(_read_any_json(checkpoint, ADAPTER))}"
        )
    raise ModelError(
        f"{checkpoint.model} holds no model.safetensors. "
        "vitray loads safetensors only, because .bin and .pt files can run code. "
        "Convert to safetensors: load it with transformers where you trust it, "
        "then save_pretrained."
    )


def _indexed_files(checkpoint: Checkpoint) -> list[str]:
    weight_map = read_json(checkpoint, "model.safetensors.index.json").get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ModelError(
            f"{checkpoint.model}: model.safetensors.index.json names no files in its weight_map. "
            "Fetch the checkpoint again."
        )
    paths = []
    for name in sorted(set(weight_map.values())):
        path = os.path.join(checkpoint.directory, name)
        if os.path.basename(name) != name or not os.path.isfile(path):
            raise ModelError(
                f"{checkpoint.model}: {name}, which its index names, is missing. "
                "Fetch the checkpoint again."
            )
        paths.append(path)
    return paths


def weight_bytes(checkpoint: Checkpoint) -> int:
    """The size of the weights. Raises ModelError when there are none."""
    return sum(os.path.getsize(path) for path in weight_files(checkpoint))


def hash_weights(checkpoint: Checkpoint) -> str:
    """sha256 over the weights, file after file: as `cat model*.safetensors | sha256sum`."""
    digest = hashlib.sha256()
    for path in weight_files(checkpoint):
        with open(path, "rb") as stream:
            while block := stream.read(8 << 20):
                digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading its files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without transformers' progress bars and load report; vitray raises its problems."""
    from transformers.utils import logging as transformers_log

    level = transformers_log.get_verbosity()
    has_bars = transformers_log.is_progress_bar_enabled()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(level)
        if has_bars:
            transformers_log.enable_progress_bar()


def read_json(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """One JSON object of the directory. Raises ModelError when it is missing or not an object."""
    document = _read_any_json(checkpoint, name)
    if not isinstance(document, dict):
        raise ModelError(
            f"{checkpoint.model}: {name} is not a JSON object. Fetch the checkpoint again."
        )
    return document


def _read_any_json(checkpoint: Checkpoint, name: str) -> Any:
    try:
        with open(os.path.join(checkpoint.directory, name), encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError as error:
        raise ModelError(
            f"{checkpoint.model} holds no {name}. Give the directory of a whole checkpoint of "
            "transformers."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{checkpoint.model}: {name} cannot be read ({one_line(error)}). "
            "Fetch the checkpoint again."
        ) from error
