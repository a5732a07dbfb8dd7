"""The run: from a listing of the source to the manifest.

- runner.py: a run and its result; source_listing.py: what the source holds now
- driver.py: the loop that gives shards to workers; schedule.py, retry.py and partition.py decide
  what goes where; events.py: what workers report
- worker.py: one worker; decoders.py: its first half; stages.py: the stages as plain functions
- local_executor.py and ray_executor.py: the workers of this machine, or of a cluster
- cluster.py: Ray and its machines; ray_internals.py: Ray's private interfaces; machines.py: what
  each worker gets
- progress.py and metrics.py: how far a run is
"""

from vitray.pipeline.cluster import joined_cluster, on_machine
from vitray.pipeline.partition import Partition, parse_partition
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.runner import run
from vitray.pipeline.source_listing import (
    Gone,
    find_gone,
    groups_of,
    list_source,
    passthrough_of,
    prepare_job,
    with_absolute_paths,
)

__all__ = [
    "Gone",
    "Partition",
    "Progress",
    "Result",
    "find_gone",
    "groups_of",
    "joined_cluster",
    "list_source",
    "on_machine",
    "parse_partition",
    "passthrough_of",
    "prepare_job",
    "run",
    "with_absolute_paths",
]
