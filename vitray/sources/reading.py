"""A shard becomes its encoded images in order, by the reader of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vitray.errors import JobError, ShardError
from vitray.job import Job
from vitray.schema import Encoded, End, Shard, ShardKind
from vitray.sources import files, manifest, parquet, tar

Reader = Callable[[Shard, Job, Callable[[int], bool]], Iterator[Encoded | End]]
READERS_BY_KIND: Mapping[ShardKind, Reader] = {
    ShardKind.TAR: tar.read_tar,
    ShardKind.FILES: files.read_files,
    ShardKind.PARQUET: parquet.read_parquet,
    ShardKind.MANIFEST: manifest.read_manifest,
}


def read_shard(shard: Shard, job: Job, is_wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The wanted images in the order of their index, then one End, whose total counts all images.

    Raises ShardError for a broken shard, ObjectChanged for another version than the planned one,
    StorageError.
    """
    try:
        yield from READERS_BY_KIND[shard.kind](shard, job, is_wanted)
    except JobError as error:
        # Listing found the job's columns in the first file, so a shard without them is broken.
        raise ShardError(f"{shard.url}: {error}") from error
