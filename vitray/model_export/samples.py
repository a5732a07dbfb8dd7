"""Images of a job's source, to calibrate an export and to compare it with its original."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vitray.dataset import Dataset
from vitray.decoding.decode import decode
from vitray.errors import SourceError
from vitray.job import Job
from vitray.schema import DecodeSpec, Encoded, ModelSpec, ShardKind, content_hash
from vitray.sources import estimate_images, list_shards, read_shard, select_shards

CALIBRATION = 300  # images at most; NNCF's own default
COMPARED = 500  # images at most
ENOUGH = 64  # from this many images on, calibration and comparison share none
LEAST = 16
DECODED = 32  # images at a time
SHARDS = 16  # at most, spread evenly: images of one class are often neighbours
DEEP = 20  # a tar is read up to this many times as many images as are drawn from it


@dataclass(frozen=True, slots=True)
class Sample:
    """uint8 [N, H, W, 3] each. is_disjoint: whether the two have no image in common."""

    calibration: np.ndarray
    compared: np.ndarray
    is_disjoint: bool


def sample_images(job: Job, spec: ModelSpec, calibrates: bool) -> Sample:
    """Good images of the job's source, each one once, in two parts if an export is calibrated.

    Raises SourceError for fewer than LEAST.
    """
    decode_spec = Dataset(job.out, job, spec, (), pa.schema([]), 1).decode_spec
    most = COMPARED + CALIBRATION * calibrates
    images = _distinct(_encoded(job, most), decode_spec)
    if len(images) < LEAST:
        raise SourceError(
            f"--calibrate {', '.join(job.source)} holds {len(images)} different good images. "
            f"A comparison needs at least {LEAST}, and {most} are better. "
            "Give more of the images that the model is for."
        )
    pixels = np.stack(images)
    if not calibrates:
        return Sample(pixels[:0], pixels, True)
    if len(pixels) < ENOUGH:
        return Sample(pixels, pixels, False)
    drawn = _drawn(len(pixels), len(pixels) // max(2, round(len(pixels) / CALIBRATION)))
    return Sample(pixels[drawn], np.delete(pixels, drawn, 0), True)


def _distinct(encoded: Iterator[Encoded], decode_spec: DecodeSpec) -> list[np.ndarray]:
    """Pixels of the images that can be decoded; images of equal bytes are taken once."""
    images: list[np.ndarray] = []
    hashes: set[bytes] = set()
    while items := list(itertools.islice(encoded, DECODED)):
        by_hash = {content_hash(item.data): item for item in items if item.data}
        new_items = [item for digest, item in by_hash.items() if digest not in hashes]
        pixels, _ = decode(new_items, decode_spec)
        hashes |= by_hash.keys()
        # copies: the decoder process reuses its memory for the next images
        images += [np.array(image) for image in pixels]
    return images


def _encoded(job: Job, most: int) -> Iterator[Encoded]:
    """About `most` images, equally many of each shard, drawn from all of it.

    Classes may be neighbours in a shard, or alternate. A tar is read from its start, so images are
    drawn from its first DEEP times as many.
    """
    shards = select_shards(list_shards(job, []).shards, job)
    shards = shards[:: -(-len(shards) // SHARDS) or 1]
    per_shard = -(-most // max(1, len(shards)))
    for shard in shards:
        rows = estimate_images([shard], job)[0] or per_shard
        rows = min(rows, DEEP * per_shard) if shard.kind is ShardKind.TAR else rows
        indices = set(_drawn(rows, min(per_shard, rows)).tolist())
        items = read_shard(shard, job, indices.__contains__)
        images = (item for item in items if isinstance(item, Encoded))
        yield from itertools.islice(images, len(indices))


def _drawn(rows: int, count: int) -> np.ndarray:
    """`count` of `rows` indices, drawn at random, sorted; the same ones each time."""
    return np.sort(np.random.default_rng(0).choice(rows, count, replace=False))
