"""A linear head apart from its backbone: what `finetune` writes for a probe, and `head:` reads.

A directory with two files: head.json says which vector the head reads and what it names, and
head.safetensors holds its numbers. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitray.errors import ModelError, VitrayError, count, one_line
from vitray.job import distinct_labels
from vitray.schema import ModelSpec, VectorColumn
from vitray.storage import absolute, join, read

FORMAT = 1
POOLS = ("cls", "mean", "patches_mean")  # of Job.embeddings
NEXT_STEP = (
    "Give a directory with head.json and head.safetensors, as vitray finetune writes it with "
    "train: probe."
)


@dataclass(frozen=True, slots=True)
class Head:
    """weight float32 [C, D] and bias float32 [C], over an embedding [D]; scores are their softmax.

    layer: None after the final LayerNorm, else 1..L. pool, normalize: as in Job.embeddings.
    weights_sha256: of the model whose embedding it reads.
    """

    labels: tuple[str, ...]
    weight: np.ndarray
    bias: np.ndarray
    layer: int | None
    pool: str
    normalize: bool
    model: str
    weights_sha256: str

    def sha256(self) -> str:
        """The hash of its numbers, its labels and the vector that it reads."""
        text = json.dumps([self.labels, self.layer, self.pool, self.normalize, self.weights_sha256])
        numbers = self.weight.tobytes() + self.bias.tobytes()
        return hashlib.sha256(text.encode() + numbers).hexdigest()

    def column(self) -> VectorColumn:
        """The vector that the head reads."""
        dimension = self.weight.shape[1]
        return VectorColumn("", dimension, self.layer, self.pool, self.normalize, "float32")


def write_head(directory: str, head: Head) -> None:
    """Write head.json and head.safetensors into an existing local directory."""
    from safetensors.numpy import save_file

    tensors = {
        "weight": np.ascontiguousarray(head.weight, np.float32),
        "bias": np.ascontiguousarray(head.bias, np.float32),
    }
    save_file(tensors, os.path.join(directory, "head.safetensors"))
    document = {
        "format": FORMAT,
        "model": head.model,
        "weights_sha256": head.weights_sha256,
        "layer": head.layer or "last",
        "pool": head.pool,
        "normalize": head.normalize,
        "labels": list(head.labels),
    }
    with open(os.path.join(directory, "head.json"), "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, ensure_ascii=False)


def read_head(url: str) -> Head:
    """The head in a directory, local or s3://. Raises ModelError unless it is a complete head."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        document = json.loads(read(join(url, "head.json")))
        return _parse_head(document, load(read(join(url, "head.safetensors"))))
    except (
        VitrayError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RecursionError,
        SafetensorError,
    ) as error:
        raise ModelError(
            f"head {url} cannot be read: {one_line(error).rstrip('.')}. {NEXT_STEP}"
        ) from error


def _parse_head(document: dict[str, Any], tensors: dict[str, np.ndarray]) -> Head:
    """Raises ValueError, KeyError or TypeError for what is not a complete head."""
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}; this version reads format {FORMAT}")
    if not isinstance(document["labels"], list):
        raise ValueError("its labels are not a list")
    labels = tuple(distinct_labels(document["labels"]))
    weight = tensors["weight"]
    bias = tensors["bias"]
    _check_numbers(weight, bias, len(labels))
    layer, pool, normalize = (document[name] for name in ("layer", "pool", "normalize"))
    is_layer = layer == "last" or (type(layer) is int and layer >= 1)
    if not is_layer or pool not in POOLS or type(normalize) is not bool:
        raise ValueError(f"layer {layer!r}, pool {pool!r}, normalize {normalize!r}")
    return Head(
        labels=labels,
        weight=weight,
        bias=bias,
        layer=None if layer == "last" else layer,
        pool=pool,
        normalize=normalize,
        model=str(document["model"]),
        weights_sha256=str(document["weights_sha256"]),
    )


def _check_numbers(weight: np.ndarray, bias: np.ndarray, labels: int) -> None:
    if not weight.dtype == bias.dtype == np.float32:
        raise ValueError(f"weight and bias are {weight.dtype} and {bias.dtype}, not float32")
    if weight.shape[:1] != bias.shape or weight.ndim != 2 or labels != len(weight):
        raise ValueError(
            f"weight {list(weight.shape)}, bias {list(bias.shape)} and {count(labels, 'label')} "
            "do not fit"
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError("its weights are not finite")


def labelled_by_head(spec: ModelSpec, url: str) -> ModelSpec:
    """The spec with the labels of a head. Raises ModelError when the head is not for this model."""
    url = absolute(url)
    head = read_head_for(url, spec)
    return replace(spec, labels=head.labels, multi_label=False, head=url, head_sha256=head.sha256())


def read_head_for(url: str, spec: ModelSpec) -> Head:
    """The head in a directory.

    Raises ModelError when it is for other weights, or for a vector that they do not have.
    """
    head = read_head(url)
    if head.weights_sha256 != spec.weights_sha256:
        raise ModelError(
            f"head {url} is for {head.model} (weights {head.weights_sha256[:12]}…), "
            f"and the embeddings are of {spec.model} ({spec.weights_sha256[:12]}…). "
            "Take the model it was made for, or make a head for this one (vitray finetune)."
        )
    if head.weight.shape[1] != spec.dimension:
        raise ModelError(
            f"head {url} takes {count(head.weight.shape[1], 'value')}, and an embedding of "
            f"{spec.model} has {spec.dimension}. Make a head for this model (vitray finetune)."
        )
    require_vector(spec, head.layer, head.pool)
    return head


def read_planned_head(spec: ModelSpec) -> Head:
    """The head that the spec names. Raises ModelError when it changed since."""
    head = read_head_for(spec.head, spec)
    if head.sha256() != spec.head_sha256:
        raise ModelError(
            f"head {spec.head} changed since it was planned. "
            "Put the old one back, or choose another `out`."
        )
    return head


def require_vector(spec: ModelSpec, layer: int | None, pool: str) -> None:
    """Raise ModelError for a layer or a token that the model does not have."""
    if layer is not None and not 1 <= layer <= spec.layers:
        raise ModelError(f"{spec.model} has no layer {layer}: layers are 1..{spec.layers} or last")
    if pool == "cls" and not spec.has_cls:
        raise ModelError(
            f"{spec.model} is a {spec.family} model, which has no CLS token; use pool: mean"
        )
