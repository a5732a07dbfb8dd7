"""Where a checkpoint is and what its files say. Needs no torch; nothing in a checkpoint is ever
executed.
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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vitray import storage
from vitray.errors import ModelError, ObjectMissing, one_line
from vitray.models import foreign
from vitray.schema import ScoreFunction, short_hash

# tokens before the patches: CLS, DeiT's distillation token; registers are added by read_config
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
# what `vitray export` wrote holds it, and of the graph's files these: see exported.py
EXPORT = "vitray_export.json"
GRAPH_FILES = ("model.onnx", "model.onnx.data", "openvino_model.xml", "openvino_model.bin")
WRAPPERS = {
    "_orig_mod.": "a compiled module",
    "module.": "a DataParallel module",
}  # by the prefix of their weights
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory on this machine. model: its name for people and for other nodes; revision: a
    commit of the hub, else None.
    """

    model: str
    revision: str | None
    directory: str


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """What config.json says of the vision tower. hf: the transformers config object of the whole
    checkpoint.
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
        """Whether each score of the checkpoint's own head stands alone, so that they do not add up
        to 1.
        """
        return self.score_function is not ScoreFunction.SOFTMAX

    def class_names(self) -> dict[int, str]:
        """The names of the head's outputs, by their number."""
        return {int(i): str(name) for i, name in self.hf.id2label.items()}


# ---------------------------------------------------------------- where it is


def locate(model: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a local directory, an s3:// directory or a Hugging Face id, fetched if it
    is not here yet.
    """
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
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise ModelError(
            f"{model} does not exist. Give a local directory, an s3:// directory, or a Hugging "
            f"Face id (org/name)."
        )
    from huggingface_hub import constants, errors, snapshot_download

    named = f"model {model}" + (f" at revision {revision}" if revision else "")
    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]
        )
        if os.path.isfile(
            os.path.join(directory, EXPORT)
        ):  # others' repositories hold graphs that nobody asked for
            snapshot_download(model, revision=revision, allow_patterns=list(GRAPH_FILES))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{named} is gated: accept its terms on huggingface.co and set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{named}: neither on the Hugging Face hub nor a local directory. Check the spelling."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{named}: no such revision. Give a branch, a tag or a commit of that model."
        ) from error
    except Exception as error:
        # any of httpx's, or of the disk's: the hub cannot be asked and the cache does not have it
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"{named} is neither a local directory nor in the cache {constants.HF_HUB_CACHE}, "
                f"and HF_HUB_OFFLINE is set. "
                "Unset it, check the spelling, or give a local directory."
            ) from error
        raise ModelError(
            f"{named} is not a local directory, not in the cache, and the Hugging Face hub gave "
            f"no answer "
            f"({type(error).__name__}). Check the spelling and the network, or give a local "
            f"directory."
        ) from error
    commit = os.path.basename(os.path.normpath(directory))
    if not COMMIT.fullmatch(commit):
        raise ModelError(
            f"{named}: the cache's snapshot {directory} is not named by a commit. Delete it and "
            f"run again."
        )
    return Checkpoint(model, commit, directory)


def _from_s3(url: str) -> str:
    """The directory's files in this node's cache; several processes that ask at once fetch it
    once.
    """
    base = storage.absolute(url) + "/"
    try:
        listed = {info.url.removeprefix(base): info for info in storage.expand(base)}
    except ObjectMissing as error:
        raise ModelError(
            f"{url} holds no checkpoint: there is no object under it. Check the URL."
        ) from error
    wanted = (".json", ".txt", ".safetensors", "spiece.model", *GRAPH_FILES)
    files = {
        name: info for name, info in listed.items() if "/" not in name and name.endswith(wanted)
    }
    if not any(name.endswith(".json") for name in files) and (other := foreign.of_weights(listed)):
        raise ModelError(f"{url} {other}")
    root = cache_directory("models")
    target = os.path.join(
        root, short_hash("\0".join(f"{i.url} {i.version}" for i in files.values()), 32)
    )
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.isdir(target):
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=root) as scratch:
                os.mkdir(whole := f"{scratch}/whole")
                for name, info in files.items():
                    source = storage.store_for(info.url).open(info.url, info.version)
                    with source, open(f"{whole}/{name}", "wb") as copy:
                        shutil.copyfileobj(source, copy, 8 << 20)
                os.rename(whole, target)
    return target


def cache_directory(name: str) -> str:
    """vitray's own directory of that name in the user's cache, made if it is not there."""
    path = os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vitray", name
    )
    os.makedirs(path, 0o755, exist_ok=True)
    return path


# ---------------------------------------------------------------- what it says


def read_config(found: Checkpoint) -> VisionConfig:
    """config.json, read by transformers' own class of that model_type; `auto_map` is not looked
    at.
    """
    if not os.path.isfile(os.path.join(found.directory, "config.json")) and (
        other := _other_library(found)
    ):
        raise ModelError(f"{found.model} {other}")
    raw = read_json(found, "config.json")
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        if other := foreign.of_config(raw) or (_other_library(found) if family is None else None):
            raise ModelError(f"{found.model} {other}")
        known = f"Known: {', '.join(FAMILIES)}."
        if family is None:
            raise ModelError(
                f"{found.model}: config.json names no model_type, so it is no checkpoint of "
                f"transformers. {known}"
            )
        raise ModelError(
            f"{found.model} is of model type {family}, which vitray does not know. {known}"
        )
    if isinstance(raw.get("id2label"), list):  # names in the order of the head's outputs
        raw["id2label"] = dict(enumerate(raw["id2label"]))
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[family].from_dict({k: v for k, v in raw.items() if k != "auto_map"})
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        patch = vision.patch_size
        spec = VisionConfig(
            family=family,
            dimension=int(vision.hidden_size),
            layers=int(vision.num_hidden_layers),
            prefix_tokens=FAMILIES[family] + int(getattr(vision, "num_register_tokens", 0)),
            image_size=(int(size[0]), int(size[1]))
            if isinstance(size, (list, tuple))
            else (int(size), int(size)),
            patch_size=int(patch[0] if isinstance(patch, (list, tuple)) else patch),
            score_function=_score_function(config),
            hf=config,
        )
    except Exception as error:  # strict dataclasses raise their own kinds
        raise ModelError(
            f"{found.model}: config.json is not a valid {family} config ({one_line(error)})."
        ) from error
    if vision.num_channels != 3:
        raise ModelError(
            f"{found.model} takes images of {vision.num_channels} channels; vitray feeds RGB."
        )
    return spec


def _other_library(found: Checkpoint) -> str | None:
    """Which other library wrote the directory, and what to do then, as the rest of a sentence; None
    when that is unknown.
    """
    try:
        names = os.listdir(found.directory)
    except OSError:  # what is to be read there says so
        return None
    documents = {name: _read_any_json(found, name) for name in foreign.SIGNS if name in names}
    return foreign.of_directory(names, documents)


def _score_function(config: Any) -> ScoreFunction:
    """What transformers' pipeline makes scores with (5.23,
    ImageClassificationPipeline.postprocess).
    """
    if config.problem_type == "regression":
        return ScoreFunction.NONE
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return ScoreFunction.SIGMOID
    return ScoreFunction.SOFTMAX


def read_labels(found: Checkpoint, config: VisionConfig) -> tuple[str, ...]:
    """Class names in the order of the head's outputs; empty when the weights hold no trained
    head.
    """
    shapes = head_shapes(found)
    head = next((names for names in HEADS if shapes.keys() >= set(names)), None)
    if head is None or config.family.endswith("_vision_model"):
        return ()
    names = config.class_names()
    outputs = shapes[head[0]][0]
    if sorted(names) != list(range(outputs)):
        raise ModelError(
            f"{found.model}: config.json names {len(names)} classes, but the head has {outputs}. "
            f"Repair id2label."
        )
    return tuple(names[i] for i in range(outputs))


def head_shapes(found: Checkpoint) -> dict[str, list[int]]:
    """The shapes of the classification heads in the weights, by name."""
    return tensor_shapes(found, {name for names in HEADS for name in names})


def tensor_shapes(found: Checkpoint, names: set[str]) -> dict[str, list[int]]:
    """The shapes of those of the names that are in the weights; out of the headers alone."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in weight_files(found):
        try:
            with safe_open(path, framework="np") as tensors:
                _require_plain_names(found, list(tensors.keys()))
                shapes |= {
                    name: tensors.get_slice(name).get_shape()
                    for name in names & set(tensors.keys())
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{found.model}: {os.path.basename(path)} is damaged ({one_line(error)}); fetch it."
            ) from error
    return shapes


def _require_plain_names(found: Checkpoint, names: list[str]) -> None:
    """Raises ModelError for weights that were saved out of a wrapper, whose names have its
    prefix.
    """
    for prefix, wrapper in WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            raise ModelError(
                f"{found.model}: every weight's name begins with `{prefix}`, because {wrapper} "
                f"was saved. "
                "Save the model inside it: unwrap it, then save_pretrained."
            )


def weight_files(found: Checkpoint) -> list[str]:
    """The safetensors files that transformers will load, sorted by name. Raises ModelError when
    there are none.
    """
    single = os.path.join(found.directory, "model.safetensors")
    if os.path.isfile(single):
        return [single]
    if os.path.isfile(f"{single}.index.json"):
        weight_map = read_json(found, "model.safetensors.index.json").get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise ModelError(
                f"{found.model}: model.safetensors.index.json names no files in its weight_map. "
                f"Fetch the checkpoint again."
            )
        names = sorted(set(weight_map.values()))
        paths = [os.path.join(found.directory, name) for name in names]
        missing = [
            name
            for name, path in zip(names, paths)
            if os.path.basename(name) != name or not os.path.isfile(path)
        ]
        if missing:
            raise ModelError(
                f"{found.model}: {missing[0]}, which its index names, is missing. Fetch the "
                f"checkpoint again."
            )
        return paths
    if os.path.isfile(os.path.join(found.directory, foreign.ADAPTER)):
        raise ModelError(
            f"{found.model} {foreign.of_adapter(_read_any_json(found, foreign.ADAPTER))}"
        )
    raise ModelError(
        f"{found.model} holds no model.safetensors. vitray loads safetensors only, because .bin "
        f"and .pt files can run code: "
        "convert to safetensors (load it with transformers where you trust it, then "
        "save_pretrained)."
    )


def hash_weights(found: Checkpoint) -> str:
    """sha256 over the weights, several files one after another: what `cat model*.safetensors |
    sha256sum` prints.
    """
    digest = hashlib.sha256()
    for path in weight_files(found):
        with open(path, "rb") as stream:
            while block := stream.read(8 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load report: what matters in them is raised."""
    from transformers.utils import logging as loud

    level, bars = loud.get_verbosity(), loud.is_progress_bar_enabled()
    loud.set_verbosity_error()
    loud.disable_progress_bar()
    try:
        yield
    finally:
        loud.set_verbosity(level)
        if bars:
            loud.enable_progress_bar()


def read_json(found: Checkpoint, name: str) -> dict[str, Any]:
    """One JSON object of the directory. Raises ModelError when it is not there, or none."""
    loaded = _read_any_json(found, name)
    if not isinstance(loaded, dict):
        raise ModelError(f"{found.model}: {name} is not a JSON object. Fetch the checkpoint again.")
    return loaded


def _read_any_json(found: Checkpoint, name: str) -> Any:
    try:
        with open(os.path.join(found.directory, name), encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError as error:
        raise ModelError(
            f"{found.model} holds no {name}. Give the directory of a whole checkpoint of "
            f"transformers."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{found.model}: {name} cannot be read ({one_line(error)}). Fetch the checkpoint again."
        ) from error
