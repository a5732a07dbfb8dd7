"""Where a process can be told to die at once, so that tests see what is left behind and what the
next run makes of it.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    *("driver-listed", "driver-resolved", "driver-planned", "model-loaded"),
    *("read", "decode", "predict", "stage", "stage-end", "object-written"),
    *("commit-written", "commit-created", "commit-errors", "commit-cleaned"),
    *("manifest-started", "manifest-written", "manifest-marked", "driver-recorded"),
)
TRAINING_POINTS = (
    "train-step",
    "train-saved",
)  # of finetune; what stands for the shard is the number of the step


def crash_point(name: str, shard: str = "") -> None:
    """kill -9 of this process where VITRAY_CRASH_AT is the point's name, or name:shard-id."""
    if os.environ.get("VITRAY_CRASH_AT") in (name, f"{name}:{shard}"):
        os.kill(os.getpid(), signal.SIGKILL)
