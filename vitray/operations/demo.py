"""`vitray demo`: shards of drawn shapes, a tiny ViT trained on such shapes, and a job for them."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator

import numpy as np

from vitray.dataset import read
from vitray.errors import StorageError
from vitray.job import Job, make_job
from vitray.operations.demo_model import NAMES, draw, train

SHARDS = 6
IMAGES = 100  # per shard
CUT_IMAGE = 41  # of each shard: a file that ends in its middle
NOT_AN_IMAGE = 77  # of each shard: an empty file, or a text


def build(directory: str, seed: int = 7) -> tuple[Job, float | None]:
    """The job of the demo, and the model's accuracy on held-out shapes.

    Writes model/ and shards/ into the directory, and keeps what an earlier call has written. The
    accuracy is None if that call has trained the model. Raises StorageError if the directory cannot
    be written.
    """
    model = os.path.join(directory, "model")
    shards = os.path.join(directory, "shards")
    try:
        os.makedirs(shards, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{shards} cannot be made: {error.strerror}. Choose another directory."
        ) from error
    is_trained = os.path.exists(os.path.join(model, "model.safetensors"))
    held_out = None if is_trained else train(model)
    _write_shards(shards, np.random.default_rng(seed))
    fields: dict[str, object] = {
        "source": os.path.join(shards, "*.tar"),
        "model": model,
        "out": os.path.join(directory, "out"),
        "keep": ["cls"],
        "engine": "torch",  # 600 images do not repay timing the other engines
    }
    return make_job(fields), held_out


def _write_shards(folder: str, rng: np.random.Generator) -> None:
    for number in range(SHARDS):
        path = os.path.join(folder, f"shapes-{number:03d}.tar")
        members = list(_members(rng, number))  # always drawn: the next shard continues from here
        if not os.path.exists(path):
            write_tar(path, members)


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
    for number in range(IMAGES):
        kind = int(rng.integers(len(NAMES)))
        image = draw(kind, rng)
        buffer = io.BytesIO()
        if number % 2:
            suffix = "jpg"
            image.save(buffer, "JPEG", quality=92)
        else:
            suffix = "png"
            image.save(buffer, "PNG")
        data = buffer.getvalue()
        if number == CUT_IMAGE:
            data = data[: len(data) // 2]
        elif number == NOT_AN_IMAGE:
            data = b"" if shard % 2 else b"this is no image"
        yield f"{shard:03d}/{number:05d}.{suffix}", data
        yield f"{shard:03d}/{number:05d}.cls", NAMES[kind].encode()
