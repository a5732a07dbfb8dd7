"""The run: from a listing of the source to the manifest.

- runner.py: a run, its rounds and its result; source_listing.py: what the source holds now
- rounds.py: one round on an executor; local_executor.py and ray_executor.py: the two executors
- stages.py: read, decode, predict and write, as functions of one fragment
- cluster.py: Ray and its machines; ray_internals.py: Ray's private interfaces
- progress.py and metrics.py: how far a run is
"""

from vitray.pipeline.cluster import joined_cluster, on_machine
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.runner import run
from vitray.pipeline.source_listing import groups_of, list_source, prepare_job, with_absolute_paths

__all__ = [
    "Progress",
    "Result",
    "groups_of",
    "joined_cluster",
    "list_source",
    "on_machine",
    "prepare_job",
    "run",
    "with_absolute_paths",
]
