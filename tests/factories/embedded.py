"""Datasets with the keys and vectors that a test gives, over tars whose members are named by
number: no model, no Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from factories import hand_made
from vitray.dataset import Dataset, commit_shard, resolve_dataset, write_end, write_fragment
from vitray.schema import ERROR_SCHEMA, Encoded, End, VectorColumn, content_hash
from vitray.sources import list_shards, read_shard

HOSTILE = [
    "two\nlines",
    'a "quoted", one',
    "=cmd|' /C calc'!A0",
    "../../x",
    "日本語 ü",
    "",
    "\r\ttab",
    "'; drop table x; --",
    "plain",
]


@dataclass(frozen=True)
class Shown:
    """What one shard holds: keys and float32 vectors [N, D], in order."""

    keys: Sequence[str]
    vectors: np.ndarray


def make(
    folder: Path,
    shards: Sequence[Shown],
    dtype: str = "float32",
    more: Sequence[str] = (),
    commit: int | None = None,
    keep: Sequence[str] = (),
) -> Dataset:
    """A dataset of these shards in folder/out.

    more: further vector columns, each its vectors times 2, 3 …; commit: only so many shards; keep:
    columns that hold the label again.
    """
    for n, shown in enumerate(shards):
        members = {f"{i:04d}.jpg": f"image {n} {i}".encode() for i in range(len(shown.keys))}
        hand_made.write_tar(folder / "in" / f"s-{n:03d}.tar", members)
    named = ["embedding"] if not more else [f"embedding_{name}" for name in ("first", *more)]
    embeddings = [
        {"dtype": dtype, "name": name.removeprefix("embedding").lstrip("_")} for name in named
    ]
    job = hand_made.job_of(folder, embeddings=embeddings, keep=list(keep))
    dimension = shards[0].vectors.shape[1]
    spec = replace(hand_made.spec_of(job.model), dimension=dimension)
    columns = [VectorColumn(name, dimension, None, "cls", False, dtype) for name in named]
    dataset = resolve_dataset(
        job,
        spec,
        columns,
        pa.schema([(name, pa.string()) for name in keep]),
        "2025-01-01T00:00:00+00:00",
    )
    listed = list_shards(job, []).shards
    for shard, shown in list(zip(listed, shards))[:commit]:
        images = [
            item for item in read_shard(shard, job, lambda _: True) if isinstance(item, Encoded)
        ]
        rows = [_row(shard.id, image, shown, named, dtype) for image in images]
        rows = [{**row, **dict.fromkeys(keep, row["label"])} for row in rows]
        table = pa.Table.from_pylist(rows, schema=dataset.schema)
        write_fragment(dataset, shard.id, (0, len(rows)), table, ERROR_SCHEMA.empty_table())
        write_end(dataset, shard.id, End(len(rows)))
        assert commit_shard(dataset, shard) is not None
    if commit is None:
        ids = [shard.id for shard in listed]
        hand_made.finish_with(dataset, ids, ids)
    return dataset


def _row(
    shard: str, image: Encoded, shown: Shown, named: Sequence[str], dtype: str
) -> dict[str, object]:
    n = image.index % len(hand_made.CLASSES)
    return {
        **{"key": shown.keys[image.index], "shard": shard, "index": image.index, "uri": image.uri},
        **{
            "width": 40,
            "height": 30,
            "format": "jpeg",
            "content_hash": content_hash(image.data or b""),
        },
        **{"label": hand_made.CLASSES[n], "label_id": n, "score": 0.75},
        **{
            "top_labels": [hand_made.CLASSES[n], hand_made.CLASSES[n - 1]],
            "top_ids": [n, n - 1],
            "top_scores": [0.75, 0.25],
        },
        **{
            name: (shown.vectors[image.index] * (at + 1)).astype(dtype)
            for at, name in enumerate(named)
        },
    }


def noise(rows: int, dimension: int = 8, seed: int = 0, keys: Sequence[str] | None = None) -> Shown:
    vectors = np.random.default_rng(seed).normal(size=(rows, dimension)).astype(np.float32)
    return Shown(keys or [f"{seed}/{n:04d}" for n in range(rows)], vectors)
