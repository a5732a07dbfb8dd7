"""scikit-learn's 1,797 handwritten digits as PNG files, and a tiny ViT's config to train on
them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vitray.operations.demo import write_tar

CONFIG: dict[str, object] = {
    "label": "cls",
    "flip": False,
    "crop": 0.6,
    "lr": 2e-3,
    "batch_size": 64,
}
SCRATCH: dict[str, object] = {
    **CONFIG,
    "train": "full",
    "init": "scratch",
    "epochs": 60,
    "label_smoothing": 0.1,
}
TRAINED = 120  # of each digit; the other 60 or so are for judging


def load() -> tuple[np.ndarray, np.ndarray]:
    """uint8 [1797, 8, 8] and the digits, in a fixed random order."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] * 255 / 16).round().astype(np.uint8), found.target[order]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, chosen: Iterable[int]) -> str:
    """A tar of these digits, with their labels as .cls and .json members, in folders called by the
    label.
    """
    images, labels = load()
    members = []
    for n in chosen:
        key = f"{labels[n]}/{n:04d}"
        members += [(f"{key}.png", png(images[n])), (f"{key}.cls", str(labels[n]).encode())]
        members += [(f"{key}.json", json.dumps({"digit": int(labels[n])}).encode())]
    write_tar(str(path), members)
    return str(path)


def folders(root: Path, chosen: Iterable[int]) -> str:
    images, labels = load()
    for n in chosen:
        (root / str(labels[n])).mkdir(parents=True, exist_ok=True)
        (root / str(labels[n]) / f"{n:04d}.png").write_bytes(png(images[n]))
    return str(root)


def few(count: int, digits: Iterable[int] = range(10), skip: int = 0) -> list[int]:
    """The first `count` of each digit, behind the first `skip`."""
    _, labels = load()
    return sorted(
        n for digit in digits for n in np.flatnonzero(labels == digit)[skip : skip + count].tolist()
    )


def model(directory: Path, width: int = 64, layers: int = 4) -> str:
    """config.json and processor of a ViT for 16 x 16 pixels; no weights."""
    from transformers import ViTConfig, ViTImageProcessorPil

    sizes = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    ViTConfig(
        **sizes,
        intermediate_size=2 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ).save_pretrained(directory)
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(directory)
    return str(directory)
