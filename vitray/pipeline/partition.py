"""The shares of independent processes that complete one dataset together.

A shard's part follows from its id alone. So processes agree on the parts even where their listings
differ, and a new shard never moves others. Parts by position in a listing would be equal in size,
but one shard more or less would shift all shards behind it to other processes. Hashed parts differ
in size by about the square root of their size. Helping balances that: a process that is done goes
on with the part after its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from vitray.errors import JobError, count

_PARTITION = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Partition:
    """One of `count` parts of the shards. index: from 0."""

    index: int
    count: int


def parse_partition(text: str) -> Partition:
    """The partition of `3/16`. Raises JobError for anything else."""
    match = _PARTITION.fullmatch(text.strip())
    if match is None:
        raise JobError(
            f"--partition {text!r}: write INDEX/COUNT, such as 3/16. The index starts at 0."
        )
    index, parts = int(match[1]), int(match[2])
    if index >= parts:
        indexes = f"0 to {parts - 1}" if parts else "none"
        raise JobError(
            f"--partition {text!r}: of {count(parts, 'part')}, the indexes are {indexes}. "
            "Write INDEX/COUNT, such as 3/16."
        )
    return Partition(index, parts)


def part_of(shard_id: str, parts: int) -> int:
    """The part, of `parts` parts, that a shard belongs to."""
    digest = hashlib.blake2b(shard_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) % parts


def partition_first(shard_ids: Iterable[str], partition: Partition) -> list[str]:
    """All shard ids: those of this part first, then the other parts', from the next part on.

    Within a part they keep their order; a helper takes another part from its end, where its owner
    comes last.
    """
    parts = list[list[str]]([] for _ in range(partition.count))
    for shard in shard_ids:
        parts[part_of(shard, partition.count)].append(shard)
    own = parts[partition.index]
    others = parts[partition.index + 1 :] + parts[: partition.index]
    return own + [shard for part in others for shard in reversed(part)]
