"""The column that names the rows of a new dataset from Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vitray.errors import JobError, ObjectMissing, ShardError
from vitray.job import Job
from vitray.schema import Shard, ShardKind, SourceRules
from vitray.sources import tables
from vitray.sources.passthrough import SCHEMA_FILES

FILES_TRIED = 5  # until one of them can be read


def find_key_column(shards: Sequence[Shard], job: Job) -> str | None:
    """The column that names the rows of a new dataset from Parquet files.

    It has a usual name and unique values, and all of the first files have it; else None.
    """
    if job.key_column or job.rules == SourceRules.V1:
        return job.key_column
    first_of_each_file = {shard.url: shard for shard in shards}.values()
    files = [shard for shard in first_of_each_file if shard.kind == ShardKind.PARQUET]
    files = files[:SCHEMA_FILES]
    for shard in files[:FILES_TRIED]:
        with suppress(JobError, ShardError, ObjectMissing):
            name = tables.find_key_column(shard, job)
            return name if name and all(_has_column(file, name, job) for file in files) else None
    return None


def _has_column(shard: Shard, name: str, job: Job) -> bool:
    """Whether a file has a column; True for a file that cannot be read."""
    with suppress(ShardError, ObjectMissing):
        return name in tables.read_schema(shard, job).names
    return True
