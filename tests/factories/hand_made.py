"""A dataset made by hand through vitray.dataset's own functions: no model, no Ray. Predictions are
a formula of the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from vitray.dataset import (
    Dataset,
    ManifestSummary,
    commit_shard,
    resolve_dataset,
    write_end,
    write_fragment,
    write_manifest,
)
from vitray.job import Job, make_job
from vitray.schema import (
    ERROR_SCHEMA,
    Encoded,
    End,
    ModelSpec,
    PixelSpec,
    Shard,
    VectorColumn,
    content_hash,
)
from vitray.sources import file_passthrough_schema, list_shards, read_shard

CLASSES = ("cat", "dog", "emu")
DIMENSION = 4
IMAGES = 10  # a shard
BAD = 3  # the index of the one image of a shard that is an error row
SAME_JOB = ("--set", "top_k=2", "--set", "embeddings=[{normalize: true}]")  # as in job_of()
PIXELS = PixelSpec((32, 32), 3, None, 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def spec_of(model: str) -> ModelSpec:
    return ModelSpec(
        model=model,
        revision=None,
        weights_sha256="7" * 64,
        family="vit",
        labels=CLASSES,
        multi_label=False,
        dimension=DIMENSION,
        layers=2,
        prefix_tokens=1,
        has_cls=True,
        pixels=PIXELS,
        precision="fp32",
        engine="torch",
        batch_size=4,
    )


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_tars(folder: Path, count: int = 3) -> str:
    """Tars of IMAGES members each, unless there are some; returns the pattern that names them."""
    for n in range(0 if folder.exists() and any(folder.glob("*.tar")) else count):
        write_tar(
            folder / f"s-{n:03d}.tar",
            {f"{n}/{i:02d}.jpg": f"image {n} {i}".encode() for i in range(IMAGES)},
        )
    return f"{folder}/*.tar"


def job_of(folder: Path, **fields: object) -> Job:
    """A job for tars in folder/in, to folder/out, with one vector of unit length."""
    base = {
        "source": f"{folder}/in/*.tar",
        "model": str(folder / "model"),
        "out": str(folder / "out"),
        "engine": "torch",
    }
    return make_job(
        {
            **base,
            "precision": "fp32",
            "fragment_rows": 4,
            "top_k": 2,
            "embeddings": [{"normalize": True}],
            **fields,
        }
    )


def make_dataset(
    folder: Path, commit: int | None = None, spec: ModelSpec | None = None, **fields: object
) -> Dataset:
    """Three tars labelled by formula into folder/out. commit: only the first so many shards (and no
    manifest step).
    """
    write_tars(folder / "in")
    job = job_of(folder, **fields)
    shards = list_shards(job, []).shards
    spec = spec or spec_of(job.model)
    vector = VectorColumn("embedding", spec.dimension, None, "cls", True, "float32")
    dataset = resolve_dataset(
        job, spec, [vector], file_passthrough_schema(shards[0], job), "2025-01-01T00:00:00+00:00"
    )
    for shard in shards[:commit]:
        stage(dataset, shard)
        assert commit_shard(dataset, shard) is not None
    if commit is None:
        finish_with(dataset, [s.id for s in shards], [s.id for s in shards])
    return dataset


def finish_with(
    dataset: Dataset, listed: Sequence[str], planned: Sequence[str], prune: bool = False
) -> ManifestSummary:
    """The manifest step over a source that is listed so."""
    return write_manifest(dataset, lambda: (listed, planned), prune)


def stage(dataset: Dataset, shard: Shard) -> None:
    """Every fragment of a shard and its tail."""
    images = [
        item for item in read_shard(shard, dataset.job, lambda _: True) if isinstance(item, Encoded)
    ]
    step = dataset.fragment_rows
    for start in range(0, len(images), step):
        part = images[start : start + step]
        rows = pa.Table.from_pylist(
            [row(dataset, shard, i) for i in part if i.index != BAD], schema=dataset.schema
        )
        errors = pa.Table.from_pylist(
            [error(shard, i) for i in part if i.index == BAD], schema=ERROR_SCHEMA
        )
        write_fragment(dataset, shard.id, (start, start + len(part)), rows, errors)
    write_end(dataset, shard.id, End(len(images)))


def row(dataset: Dataset, shard: Shard, image: Encoded) -> dict[str, object]:
    classes, n = dataset.spec.labels, image.index % len(dataset.spec.labels)
    vector = np.arange(1, dataset.spec.dimension + 1, dtype=np.float32) + image.index
    return {
        **{"key": image.key, "shard": shard.id, "index": image.index, "uri": image.uri},
        **{
            "width": 40,
            "height": 30,
            "format": "JPEG",
            "content_hash": content_hash(image.data or b""),
        },
        **{"label": classes[n], "label_id": n, "score": 0.75},
        **{
            "top_labels": [classes[n], classes[n - 1]],
            "top_ids": [n, (n - 1) % len(classes)],
            "top_scores": [0.75, 0.25],
        },
        "embedding": vector / np.linalg.norm(vector),
    }


def error(shard: Shard, image: Encoded) -> dict[str, object]:
    data = image.data or b""
    place = {"key": image.key, "shard": shard.id, "index": image.index, "uri": image.uri}
    return {
        **place,
        "reason": "not_an_image",
        "message": "no",
        "content_hash": content_hash(data),
        "size_bytes": len(data),
    }


def checkpoint_spec(folder: Path) -> ModelSpec:
    """The spec of a new checkpoint in folder/model, which has a head and no other weights."""
    from safetensors.numpy import save_file

    directory = folder / "model"
    directory.mkdir(parents=True)
    config = {
        "model_type": "vit",
        "hidden_size": DIMENSION,
        "num_hidden_layers": 2,
        "image_size": 32,
        "patch_size": 8,
        "id2label": dict(enumerate(CLASSES)),
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        "size": {"height": 32, "width": 32},
        "resample": PIXELS.resample,
        "rescale_factor": PIXELS.rescale,
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = directory / "model.safetensors"
    save_file({"classifier.weight": np.zeros((len(CLASSES), DIMENSION), np.float32)}, weights)
    weights_sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    return replace(spec_of(str(directory)), weights_sha256=weights_sha256)
