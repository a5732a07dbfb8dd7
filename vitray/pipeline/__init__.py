"""The straight line: runner.py, the run from listing to manifest; steps.py, what happens to a
fragment; line.py, how Ray Data moves it; cluster.py, Ray itself; progress.py, how far it is.
"""

from vitray.pipeline.cluster import joined, on_machine
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.runner import run
from vitray.pipeline.source_listing import groups_of, list_source, prepared, with_absolute_paths

__all__ = [
    "Progress",
    "Result",
    "groups_of",
    "joined",
    "list_source",
    "on_machine",
    "prepared",
    "run",
    "with_absolute_paths",
]
