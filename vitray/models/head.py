"""A linear head apart from its backbone: what `finetune` writes for a probe, and what `head:`
reads. Needs no torch.

Two files in a directory: head.json says what it reads and what it names, head.safetensors holds its
numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np

from vitray.errors import ModelError, VitrayError, one_line
from vitray.job import distinct_labels
from vitray.storage import join, read

FORMAT = 1
POOLS = ("cls", "mean", "patches_mean")  # of Job.embeddings
NEXT = (
    "Give a directory with head.json and head.safetensors, as vitray finetune writes it with "
    "train: probe."
)


@dataclass(frozen=True, slots=True)
class Head:
    """weight float32 [C, D], bias float32 [C], over an embedding [D] of the model whose weights
    have that sha256.

    layer: None after the final LayerNorm, else 1..L. pool, normalize: as in Job.embeddings. Its
    scores are a softmax.
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
        """Of its numbers, its labels and what it reads."""
        said = json.dumps([self.labels, self.layer, self.pool, self.normalize, self.weights_sha256])
        return hashlib.sha256(
            said.encode() + self.weight.tobytes() + self.bias.tobytes()
        ).hexdigest()


def write_head(directory: str, head: Head) -> None:
    """head.json and head.safetensors in a local directory that is there."""
    from safetensors.numpy import save_file

    weight, bias = (np.ascontiguousarray(x, np.float32) for x in (head.weight, head.bias))
    save_file({"weight": weight, "bias": bias}, os.path.join(directory, "head.safetensors"))
    said = {
        "format": FORMAT,
        "model": head.model,
        "weights_sha256": head.weights_sha256,
        "layer": head.layer or "last",
    }
    said |= {"pool": head.pool, "normalize": head.normalize, "labels": list(head.labels)}
    with open(os.path.join(directory, "head.json"), "w", encoding="utf-8") as file:
        json.dump(said, file, indent=1, ensure_ascii=False)


def read_head(url: str) -> Head:
    """The head in a directory, local or s3://. Raises ModelError for what is no head, or not a
    whole one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        said = json.loads(read(join(url, "head.json")))
        tensors = load(read(join(url, "head.safetensors")))
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']}, this vitray knows {FORMAT}")
        if not isinstance(said["labels"], list):
            raise ValueError("its labels are no list")
        weight, bias, labels = (
            tensors["weight"],
            tensors["bias"],
            tuple(distinct_labels(said["labels"])),
        )
        if not weight.dtype == bias.dtype == np.float32:
            raise ValueError(f"weight and bias are {weight.dtype} and {bias.dtype}, not float32")
        if weight.shape[:1] != bias.shape or weight.ndim != 2 or len(labels) != len(weight):
            raise ValueError(
                f"weight {list(weight.shape)}, bias {list(bias.shape)} and {len(labels)} labels "
                f"do not fit"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise ValueError("its weights are not finite")
        layer, pool, normalize = (said[name] for name in ("layer", "pool", "normalize"))
        if (
            (layer != "last" and (type(layer) is not int or layer < 1))
            or pool not in POOLS
            or type(normalize) is not bool
        ):
            raise ValueError(f"layer {layer!r}, pool {pool!r}, normalize {normalize!r}")
        model, weights_sha256 = str(said["model"]), str(said["weights_sha256"])
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
            f"head {url} cannot be read: {one_line(error).rstrip('.')}. {NEXT}"
        ) from error
    return Head(
        labels,
        weight,
        bias,
        None if layer == "last" else layer,
        pool,
        normalize,
        model,
        weights_sha256,
    )
