"""Shards for the tests: the same drawn shapes as tars, Parquet, loose files and a manifest, and
plain loops to compare with.
"""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitray.operations import demo_model
from vitray.operations.demo import write_tar


@dataclass(frozen=True)
class Picture:
    key: str
    data: bytes
    truth: str
    suffix: str


def pictures(count: int, seed: int = 1) -> list[Picture]:
    """Drawn shapes as PNG and JPEG in turn, keys like 00042."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        kind, buffer = int(rng.integers(len(demo_model.NAMES))), io.BytesIO()
        image = demo_model.draw(kind, rng)
        image.save(buffer, "PNG" if n % 2 else "JPEG")
        made.append(
            Picture(
                f"{n:05d}", buffer.getvalue(), demo_model.NAMES[kind], "png" if n % 2 else "jpg"
            )
        )
    return made


def split(items: list[Picture], shards: int) -> list[list[Picture]]:
    """Cut into shards of unequal size, order kept."""
    cuts = np.unique(np.linspace(0, len(items) ** 0.5, shards + 1) ** 2).astype(int)
    cuts[-1] = len(items)
    return [items[a:b] for a, b in itertools.pairwise(cuts)]


def tar_bytes(items: list[Picture], folder: Path) -> bytes:
    path = folder / "scratch.tar"
    write_tar(
        str(path),
        [
            m
            for p in items
            for m in ((f"{p.key}.{p.suffix}", p.data), (f"{p.key}.cls", p.truth.encode()))
        ],
    )
    return path.read_bytes()


def put(url: str, data: bytes) -> None:
    from vitray.storage import store_for

    store_for(url).replace(url, data)


def put_tars(root: str, items: list[Picture], shards: int, scratch: Path) -> None:
    for n, part in enumerate(split(items, shards)):
        put(f"{root}/s-{n:03d}.tar", tar_bytes(part, scratch))


def put_parquet(root: str, items: list[Picture], rows_a_group: int) -> None:
    table = pa.table(
        {
            "key": [p.key for p in items],
            "image": [{"bytes": p.data, "path": f"{p.key}.{p.suffix}"} for p in items],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=rows_a_group)
    put(f"{root}/all.parquet", sink.getvalue().to_pybytes())


def put_files(root: str, items: list[Picture]) -> None:
    for p in items:
        put(f"{root}/{p.key}.{p.suffix}", p.data)


def put_manifest(root: str, items: list[Picture], folder: str) -> None:
    lines = [json.dumps({"path": f"{folder}/{p.key}.{p.suffix}", "key": p.key}) for p in items]
    put(f"{root}/list.jsonl", "\n".join(lines).encode())


@dataclass(frozen=True)
class Plain:
    """What a plain transformers loop says: logits [N, classes] and CLS [N, D], float32."""

    logits: np.ndarray
    cls: np.ndarray

    @property
    def ids(self) -> np.ndarray:
        return self.logits.argmax(1)


def plain_loop(model: str, items: list[Picture], precision: str = "float32") -> Plain:
    """load_image, the checkpoint's own PIL processor, its forward pass: nothing of vitray."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification
    from transformers.image_utils import load_image

    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    network = (
        AutoModelForImageClassification.from_pretrained(model).eval().to(getattr(torch, precision))
    )
    logits, cls = [], []
    for start in range(0, len(items), 50):
        images = [load_image(Image.open(io.BytesIO(p.data))) for p in items[start : start + 50]]
        pixels = processor(images, return_tensors="pt")["pixel_values"].to(
            getattr(torch, precision)
        )
        with torch.inference_mode():
            body = network.base_model(pixels).last_hidden_state
            logits.append(network(pixels).logits.float().numpy())
            cls.append(body[:, 0].float().numpy())
    return Plain(np.concatenate(logits), np.concatenate(cls))
