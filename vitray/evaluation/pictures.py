"""Small pictures of chosen rows, decoded again from the source."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any, cast

import numpy as np
import simplejpeg

from vitray.dataset import Dataset, base_of, read_table
from vitray.decoding.decode import decode
from vitray.errors import VitrayError, one_line
from vitray.schema import DecodeSpec, Encoded, PixelSpec, Shard, ShardKind, content_hash
from vitray.sources import read_shard
from vitray.storage import store_for

Ref = tuple[str, int]  # of a row: (shard, index)

SIDE = 128
SOURCE_BYTES = 2 << 30  # of tars and Parquet files, which are read up to the last picture
BICUBIC = 3  # of PIL
GONE = "Some images are no longer in the source, or have changed since they were labelled."
CHANGED = "Some images have changed since they were labelled."
TOO_MANY_BYTES = (
    f"Pictures come from the first {SOURCE_BYTES >> 30} GB of the source that were read for them."
)


def rows_of(dataset: Dataset, refs: Iterable[Ref], names: list[str]) -> dict[Ref, dict[str, Any]]:
    """The named columns of these rows."""
    rows: dict[Ref, dict[str, Any]] = {}
    for shard, indexes in _by_shard(refs).items():
        url = dataset.data_url(shard)
        with store_for(url).open(url) as stream:
            table = read_table(stream, ["index", *names])
        matches = np.flatnonzero(np.isin(table["index"].to_numpy(), list(indexes)))
        rows |= {(shard, row["index"]): row for row in table.take(matches).to_pylist()}
    return rows


def pictures_of(
    dataset: Dataset, shards: Mapping[str, Shard], rows: Mapping[Ref, Mapping[str, Any]]
) -> tuple[dict[Ref, str], list[str]]:
    """data: URLs of JPEGs of SIDE x SIDE pixels, and why some rows have none.

    shards: the source as it is now, by id. rows: with content_hash, since an image that has changed
    since it was labelled is not shown.
    """
    pictures: dict[Ref, str] = {}
    notes: dict[str, None] = {}  # in order, each once
    bytes_left = SOURCE_BYTES
    indexes = _by_shard(rows)
    # by any version: where one file of a group changed, the others are the same
    listed = {base_of(shard.id): shard for shard in shards.values()}
    for shard_id in sorted(indexes, key=lambda name: (-len(indexes[name]), name)):
        shard = listed.get(base_of(shard_id))
        if shard is None:
            notes[GONE] = None
            continue
        if shard.kind in (ShardKind.TAR, ShardKind.PARQUET) and pictures:
            bytes_left -= shard.size
        if bytes_left < 0:
            notes[TOO_MANY_BYTES] = None
            break
        try:
            for item in _images(dataset, shard, indexes[shard_id]):
                ref = (shard_id, item.index)
                if content_hash(item.data or b"") != rows[ref]["content_hash"]:
                    notes[CHANGED] = None
                elif (url := _jpeg(item, dataset)) is not None:
                    pictures[ref] = url
        except (VitrayError, OSError) as error:
            notes[f"The source could not be read again: {one_line(error)}"] = None
    return pictures, list(notes)


def _images(dataset: Dataset, shard: Shard, indexes: set[int]) -> Iterable[Encoded]:
    """The images of a shard with these indexes; reads no further than the last one."""
    last = max(indexes)
    items = cast(Any, read_shard(shard, dataset.job, lambda index: index in indexes))
    with closing(items):
        for item in items:
            if isinstance(item, Encoded):
                yield item
                if item.index == last:
                    return


def _jpeg(image: Encoded, dataset: Dataset) -> str | None:
    """The middle of an image, encoded again, so that no byte of the input reaches the page.

    None: it cannot be decoded.
    """
    job = dataset.decode_spec
    middle = PixelSpec((SIDE,), BICUBIC, (SIDE, SIDE), 1.0, (0, 0, 0), (1, 1, 1))
    pixels, _ = decode([image], DecodeSpec(middle, job.formats, job.max_pixels, job.background))
    if not len(pixels):
        return None
    jpeg = simplejpeg.encode_jpeg(pixels[0], quality=82, colorspace="RGB")
    return f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"


def _by_shard(refs: Iterable[Ref]) -> dict[str, set[int]]:
    """The indexes of rows, by shard id."""
    indexes: dict[str, set[int]] = {}
    for shard, index in refs:
        indexes.setdefault(shard, set()).add(index)
    return indexes
