"""`vitray demo`: shapes drawn into shards, a tiny ViT trained on such shapes, and a job that labels
them.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

import numpy as np

from vitray.dataset import read
from vitray.errors import StorageError
from vitray.job import Job, make_job
from vitray.models.shapes import NAMES, draw, train

SHARDS = 6
IMAGES = 100  # a shard


def build(directory: str, seed: int = 7) -> tuple[Job, float]:
    """Write model/ and shards/ into a directory; returns the job and the model's accuracy on
    held-out shapes.

    What is there from an earlier call is kept. Raises StorageError where nothing can be made.
    """
    model, shards = os.path.join(directory, "model"), os.path.join(directory, "shards")
    try:
        os.makedirs(shards, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{shards} cannot be made: {error.strerror}. Choose another directory."
        ) from error
    accuracy = (
        train(model)
        if not os.path.exists(os.path.join(model, "model.safetensors"))
        else float("nan")
    )
    rng = np.random.default_rng(seed)
    for n in range(SHARDS):
        path = os.path.join(shards, f"shapes-{n:03d}.tar")
        members = list(_members(rng, n))
        if not os.path.exists(path):
            write_tar(path, members)
    fields: dict[str, object] = {
        "source": os.path.join(shards, "*.tar"),
        "model": model,
        "out": os.path.join(directory, "out"),
        "keep": ["cls"],
        "engine": "torch",  # 600 images do not repay timing the others
    }
    return make_job(fields), accuracy


def accuracy(out: str) -> float:
    """Share of rows whose label is the class that was drawn."""
    table = read(out, columns=["label", "cls"])
    pairs = list(zip(table["label"].to_pylist(), table["cls"].to_pylist()))
    return float(sum(label == truth for label, truth in pairs)) / max(1, len(pairs))


def write_tar(path: str, members: list[tuple[str, bytes]]) -> None:
    """A tar of (name, bytes) with fixed times, so that the same members give the same bytes."""
    with tarfile.open(path + ".part", "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    os.replace(path + ".part", path)


def _members(rng: np.random.Generator, shard: int) -> Iterator[tuple[str, bytes]]:
    for n in range(IMAGES):
        kind = int(rng.integers(len(NAMES)))
        image, buffer, suffix = draw(kind, rng), io.BytesIO(), "jpg" if n % 2 else "png"
        image.save(buffer, "JPEG" if n % 2 else "PNG", **({"quality": 92} if n % 2 else {}))
        data = buffer.getvalue()
        if n == 41:
            data = data[: len(data) // 2]  # cut
        elif n == 77:
            data = b"" if shard % 2 else b"this is no image"
        yield f"{shard:03d}/{n:05d}.{suffix}", data
        yield f"{shard:03d}/{n:05d}.cls", NAMES[kind].encode()
