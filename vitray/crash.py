"""Named points at which a process can kill itself.

Tests use them to check what a crash leaves behind and how the next run recovers.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "driver-listed",
    "driver-resolved",
    "driver-planned",
    "model-loaded",
    "read",
    "decode",
    "predict",
    "stage",
    "stage-end",
    "object-written",
    "commit-written",
    "commit-created",
    "commit-errors",
    "commit-cleaned",
    "manifest-started",
    "manifest-written",
    "manifest-marked",
    "driver-recorded",
)
# of `vitray remove`
REMOVAL_POINTS = (
    "removal-blocked",
    "removal-written",
    "removal-replaced",
    "removal-rewritten",
    "removal-finished",
)
# of `vitray clean --keep-versions`
VERSION_POINTS = ("version-marked", "version-unmarked", "version-emptied")


def crash_point(name: str, shard: str = "") -> None:
    """kill -9 of this process where VITRAY_CRASH_AT is the point's name, or name:shard-id.

    In a training, the step's number takes the place of the shard id.
    """
    if os.environ.get("VITRAY_CRASH_AT") in (name, f"{name}:{shard}"):
        os.kill(os.getpid(), signal.SIGKILL)
