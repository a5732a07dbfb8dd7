"""Small pictures of chosen rows, decoded from the source anew. Private to this package."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any, cast

import numpy as np
import simplejpeg

from vitray.consume.report.counts import Ref
from vitray.dataset import Dataset, base_of, read_table
from vitray.decoding.decode import decode
from vitray.errors import VitrayError, one_line
from vitray.schema import DecodeSpec, Encoded, PixelSpec, Shard, content_hash
from vitray.sources import read_shard
from vitray.storage import store_for

SIDE = 128
SOURCE_BYTES = 2 << 30  # read of tars and Parquet files, which have to be read up to a picture
BICUBIC = 3


def rows_of(dataset: Dataset, refs: Iterable[Ref], names: list[str]) -> dict[Ref, dict[str, Any]]:
    """The named columns of these rows."""
    found: dict[Ref, dict[str, Any]] = {}
    for shard, wanted in _by_shard(refs).items():
        with store_for(url := dataset.data_url(shard)).open(url) as stream:
            table = read_table(stream, ["index", *names])
        at = np.flatnonzero(np.isin(table["index"].to_numpy(), list(wanted)))
        found |= {(shard, row["index"]): row for row in table.take(at).to_pylist()}
    return found


def pictures_of(
    dataset: Dataset, listed: Mapping[str, Shard], rows: Mapping[Ref, Mapping[str, Any]]
) -> tuple[dict[Ref, str], list[str]]:
    """data: URLs of JPEGs of SIDE x SIDE pixels, and why rows have none. listed: the source as it
    is now.

    rows: with content_hash: an image that is not the one that was labelled is not shown.
    """
    pictures: dict[Ref, str] = {}
    why: dict[str, None] = {}
    left = SOURCE_BYTES
    wanted = _by_shard(rows)
    # of whatever version: where one file of a group changed, the others are as they were
    now = {base_of(shard.id): shard for shard in listed.values()}
    for name in sorted(wanted, key=lambda name: (-len(wanted[name]), name)):
        shard = now.get(base_of(name))
        if shard is None:
            why[
                "Some images are no longer in the source, or have changed since they were labelled."
            ] = None
            continue
        if shard.kind in ("tar", "parquet") and pictures:
            left -= shard.size
        if left < 0:
            why[
                f"Pictures come from the first {SOURCE_BYTES >> 30} GB of the source that were "
                f"read for them."
            ] = None
            break
        try:
            for item in _images(dataset, shard, wanted[name]):
                ref = (name, item.index)
                if content_hash(item.data or b"") == rows[ref]["content_hash"]:
                    if (url := _jpeg(item, dataset)) is not None:
                        pictures[ref] = url
                else:
                    why["Some images have changed since they were labelled."] = None
        except (VitrayError, OSError) as error:
            why[f"The source could not be read again: {one_line(error)}"] = None
    return pictures, list(why)


def _images(dataset: Dataset, shard: Shard, indexes: set[int]) -> Iterable[Encoded]:
    last = max(indexes)
    with closing(
        cast(Any, read_shard(shard, dataset.job, lambda index: index in indexes))
    ) as items:
        for item in items:
            if isinstance(item, Encoded):
                yield item
                if item.index == last:  # what follows need not be read
                    return


def _jpeg(image: Encoded, dataset: Dataset) -> str | None:
    """The middle of an image as our own JPEG: not a byte of the input reaches the page. None: it
    cannot be decoded so.
    """
    job = dataset.decode_spec
    middle = PixelSpec((SIDE,), BICUBIC, (SIDE, SIDE), 1.0, (0, 0, 0), (1, 1, 1))
    pixels, _ = decode([image], DecodeSpec(middle, job.formats, job.max_pixels, job.background))
    if not len(pixels):
        return None
    return (
        "data:image/jpeg;base64,"
        + b64encode(simplejpeg.encode_jpeg(pixels[0], quality=82, colorspace="RGB")).decode()
    )


def _by_shard(refs: Iterable[Ref]) -> dict[str, set[int]]:
    shards: dict[str, set[int]] = {}
    for shard, index in refs:
        shards.setdefault(shard, set()).add(index)
    return shards
