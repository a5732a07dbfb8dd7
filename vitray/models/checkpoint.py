"""Where a checkpoint is and what its files say.

Needs no torch, and executes nothing of a checkpoint. Directories of other libraries are recognised,
so that an error can name the next step.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vitray import storage
from vitray.errors import ModelError, ObjectMissing, one_line, shortened
from vitray.schema import ScoreFunction, short_hash

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
HUB_FILES = ["*.json", "model.safetensors", "model-*.safetensors", "merges.txt", "spiece.model"]
# `vitray export` writes this file into its directory, and these graph files: see exported.py
EXPORT = "vitray_export.json"
GRAPH_FILES = ("model.onnx", "model.onnx.data", "openvino_model.xml", "openvino_model.bin")
BUCKET_FILES = (".json", ".txt", ".safetensors", "spiece.model", *GRAPH_FILES)  # by suffix
# by the prefix of their weights
WRAPPERS = {"_orig_mod.": "a compiled module", "module.": "a DataParallel module"}
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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


# ---------------------------------------------------------------- where it is


def locate(model: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a local or s3:// directory or a Hugging Face id, fetched if necessary."""
    path = os.path.expanduser(model.removeprefix("file://"))
    if not model.startswith("s3://") and not os.path.exists(path):
        return _from_hub(model, revision)
    if revision is not None:
        raise ModelError(
            f"{model} is a directory, which has no revisions. Leave `revision` out, or give a "
            f"Hugging Face id."
        )
    if model.startswith("s3://"):
        return Checkpoint(storage.absolute(model), None, _from_s3(model))
    if not os.path.isdir(path):
        raise ModelError(
            f"{model} is a file. Give the directory that holds config.json and model.safetensors."
        )
    return Checkpoint(storage.absolute(path), None, storage.absolute(path))


def _from_hub(model: str, revision: str | None) -> Checkpoint:
    if not HUB_NAME.fullmatch(model):
        raise ModelError(
            f"{model} does not exist. Give a local directory, an s3:// directory, or a Hugging "
            f"Face id (org/name)."
        )
    name = f"model {model}" + (f" at revision {revision}" if revision else "")
    directory = _download(model, revision, name)
    commit = os.path.basename(os.path.normpath(directory))
    if not COMMIT.fullmatch(commit):
        raise ModelError(
            f"{name}: the cache's snapshot {directory} is not named by a commit. Delete it and "
            f"run again."
        )
    return Checkpoint(model, commit, directory)


def _download(model: str, revision: str | None, name: str) -> str:
    """The directory of a hub snapshot. name: the model and its revision, for messages."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
        # graphs only where vitray exported them: those of other repositories are not needed
        if os.path.isfile(os.path.join(directory, EXPORT)):
            snapshot_download(model, revision=revision, allow_patterns=list(GRAPH_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on huggingface.co and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{name}: neither on the Hugging Face hub nor a local directory. Check the spelling."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{name}: no such revision. Give a branch, a tag or a commit of that model."
        ) from error
    except Exception as error:
        # any exception of httpx or of the disk: no answer from the hub, and not in the cache
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{name} is neither a local directory nor in the cache {constants.HF_HUB_CACHE}, "
                f"and HF_HUB_OFFLINE is set. Unset it, check the spelling, or give a local "
                f"directory."
            ) from error
        raise ModelError(
            f"{name} is not a local directory, not in the cache, and the Hugging Face hub gave "
            f"no answer ({type(error).__name__}). Check the spelling and the network, or give a "
            f"local directory."
        ) from error
    return str(directory)


def _from_s3(url: str) -> str:
    """The directory in this node's cache; processes that ask at the same time fetch it once."""
    base = storage.absolute(url) + "/"
    try:
        listed = {info.url.removeprefix(base): info for info in storage.expand(base)}
    except ObjectMissing as error:
        raise ModelError(
            f"{url} holds no checkpoint: there is no object under it. Check the URL."
        ) from error
    files = {
        name: info
        for name, info in listed.items()
        if "/" not in name and name.endswith(BUCKET_FILES)
    }
    has_json = any(name.endswith(".json") for name in files)
    if not has_json and (problem := describe_weights(listed)):
        raise ModelError(f"{url} {problem}")
    root = cache_directory("models")
    versions = "\0".join(f"{info.url} {info.version}" for info in files.values())
    target = os.path.join(root, short_hash(versions, 32))
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(target):
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=root) as scratch:
                complete = f"{scratch}/whole"
                os.mkdir(complete)
                for name, info in files.items():
                    source = storage.store_for(info.url).open(info.url, info.version)
                    with source, open(f"{complete}/{name}", "wb") as copy:
                        shutil.copyfileobj(source, copy, 8 << 20)
                os.rename(complete, target)
    return target


def cache_directory(name: str) -> str:
    """vitray's own directory of that name in the user's cache; it is created if necessary."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(root, "vitray", name)
    os.makedirs(path, 0o755, exist_ok=True)
    return path


# ---------------------------------------------------------------- its config


def read_config(checkpoint: Checkpoint) -> VisionConfig:
    """config.json, read by transformers' own class of that model_type; `auto_map` is ignored."""
    fields = _config_fields(checkpoint)
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
            score_function=_score_function(config),
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


def _config_fields(checkpoint: Checkpoint) -> dict[str, Any]:
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


def _score_function(config: Any) -> ScoreFunction:
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
            f"{checkpoint.model}: config.json names {len(names)} classes, but the head has "
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
                f"Fetch it again."
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
        f"{checkpoint.model} holds no model.safetensors. vitray loads safetensors only, because "
        f".bin and .pt files can run code. Convert to safetensors: load it with transformers where "
        f"you trust it, then save_pretrained."
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
            f"Fetch the checkpoint again."
        )
    paths = []
    for name in sorted(set(weight_map.values())):
        path = os.path.join(checkpoint.directory, name)
        if os.path.basename(name) != name or not os.path.isfile(path):
            raise ModelError(
                f"{checkpoint.model}: {name}, which its index names, is missing. Fetch the "
                f"checkpoint again."
            )
        paths.append(path)
    return paths


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
            f"transformers."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{checkpoint.model}: {name} cannot be read ({one_line(error)}). Fetch the checkpoint "
            f"again."
        ) from error


# ---------------------------------------------------------------- checkpoints of other libraries
# Pure functions: each returns the rest of a sentence about the model, or None when it is unknown.

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
            f"holds {file}, a graph that vitray export did not write. Give the checkpoint of "
            "transformers that it was made from, or export that (vitray export)."
        )
    if file := _first(names, OTHER_WEIGHTS):
        return (
            f"holds {file} and no config.json, so nothing says which network the weights belong "
            f"to, and files such as .bin and .pth can run code. Load them in the code that wrote "
            f"them, save the model as a checkpoint of transformers (save_pretrained), and give "
            f"that directory."
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
