"""How many images are in shards: exact where a file says it, else from the start of a few tars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

from vitray.errors import ObjectMissing, ShardError
from vitray.job import Job
from vitray.schema import Shard, ShardKind
from vitray.sources import tar

ESTIMATE_TARS = 5


def estimate_images(shards: Sequence[Shard], job: Job) -> tuple[int, bool]:
    """(number of images, whether it is exact).

    The number in a tar is only known after a walk over its headers. A few tars are walked at their
    start, and the other ones are assumed to be like them.
    """
    counted = sum(shard.rows or 0 for shard in shards)
    tars = [shard for shard in shards if shard.kind == ShardKind.TAR]
    unreadable = any(shard.rows is None for shard in shards if shard.kind != ShardKind.TAR)
    images = 0
    walked = 0
    complete_walks = 0
    for shard in tars[:: math.ceil(len(tars) / ESTIMATE_TARS) or 1]:
        try:
            samples, size, _ = tar.count_samples(shard, job)
        except (ShardError, ObjectMissing):
            continue
        images += samples
        walked += size
        complete_walks += size == shard.size
    if complete_walks == len(tars):
        return counted + images, not unreadable
    total_size = sum(shard.size for shard in tars)
    return counted + round(total_size * images / walked if walked else 0), False


def count_again(shard: Shard, job: Job) -> tuple[int, dict[str, int] | None]:
    """(number of images, what has no row; None where only reading the images would tell).

    A tar is walked from end to end. Raises ShardError, ObjectMissing, StorageError.
    """
    if shard.kind == ShardKind.TAR:
        return tar.count_all_samples(shard, job)
    if shard.rows is None:
        raise ShardError(f"{shard.url} cannot be read")
    return shard.rows, None


def images_per_byte(tars: Sequence[Shard], job: Job) -> float:
    """The images in a byte of the first of these tars that can be read; 0 when none can."""
    for shard in tars[:ESTIMATE_TARS]:
        with suppress(ShardError, ObjectMissing):
            images, walked, _ = tar.count_samples(shard, job)
            return images / walked if walked else 0.0
    return 0.0
