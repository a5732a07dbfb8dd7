"""From URL patterns to shards, and from a shard to its encoded images in order. One file a format."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from vitray.errors import JobError, ObjectMissing, ShardError
from vitray.job import Job
from vitray.schema import Encoded, End, Shard, short_hash
from vitray.sources import files, manifest, parquet, tables, tar
from vitray.sources.files import Group
from vitray.sources.listing import Listing, list_shards
from vitray.sources.tar import absent_members

__all__ = [
    "Group", "Listing", "absent_members", "chosen", "estimate_images", "kept_schema", "list_shards", "read_shard",
    "require_kept",
]  # fmt: skip

READ = {"tar": tar.read_tar, "files": files.read_files, "parquet": parquet.read_parquet, "manifest": manifest.read_manifest}
KEPT = {"tar": tar.kept_schema, "files": files.kept_schema, "parquet": tables.kept_schema, "manifest": tables.kept_schema}
ESTIMATE_SHARDS = 5


def read_shard(shard: Shard, job: Job, wanted: Callable[[int], bool]) -> Iterator[Encoded | End]:
    """The wanted images in the order of their index, then exactly one End, whose total counts all.

    Raises ShardError when the shard is broken, ObjectChanged when it is not what was planned, StorageError.
    """
    try:
        yield from READ[shard.kind](shard, job, wanted)
    except JobError as error:  # listing saw the job's columns in the first file: one without is broken
        raise ShardError(f"{shard.url}: {error}") from error


def chosen(shards: Sequence[Shard], job: Job) -> list[Shard]:
    """Those that `since`, `sample` and `limit` leave, one after the other: whole shards, and the same ones when the source has grown."""
    least = job.since_s()
    recent = [shard for shard in shards if least is None or shard.modified is None or shard.modified >= least]
    return [shard for shard in recent if job.sample is None or _lot(shard) < job.sample][: job.limit]


def _lot(shard: Shard) -> float:
    """0..1, by what stays of the id when the shard's bytes change."""
    return int(short_hash(shard.id.rpartition("-")[0], 12), 16) / 16**12


def kept_schema(shard: Shard, job: Job) -> pa.Schema:
    """The types of the job's kept columns as this shard has them, in the order of job.keep.

    Raises JobError for a column that the shard has not, ShardError when it cannot be read.
    """
    schema = KEPT[shard.kind](shard, job)
    return pa.schema([field.with_name(job.kept_as(field.name)) for field in schema])


def require_kept(shard: Shard, job: Job, kept: pa.Schema) -> None:
    """Raises ShardError when a kept column's values would not go into the dataset's type unchanged, JobError when there is none."""
    for mine, field in zip(kept_schema(shard, job), kept, strict=True):
        try:
            both = pa.unify_schemas([pa.schema([field]), pa.schema([mine])], promote_options="permissive").types
        except pa.ArrowException:
            both = []
        if both != [field.type]:
            raise ShardError(
                f"{shard.url}: column `{mine.name}` is {mine.type}, in this dataset it is {field.type}. Write it with that type, or "
                "give this input an `out` of its own."
            )


def estimate_images(shards: Sequence[Shard], job: Job) -> tuple[int, bool]:
    """(images, exact?). Tars do not tell: the headers of a few are walked, and the rest is taken to be like them."""
    known = sum(shard.rows or 0 for shard in shards)
    tars = [shard for shard in shards if shard.kind == "tar"]
    unreadable = any(shard.rows is None for shard in shards if shard.kind != "tar")
    images, walked, whole = 0, 0, 0
    for shard in tars[:: math.ceil(len(tars) / ESTIMATE_SHARDS) or 1]:
        try:
            count, size, _ = tar.count_samples(shard, job)
        except (ShardError, ObjectMissing):
            continue
        images, walked, whole = images + count, walked + size, whole + (size == shard.size)
    if whole == len(tars):
        return known + images, not unreadable
    return known + round(sum(shard.size for shard in tars) * images / walked if walked else 0), False
