"""The CPUs of this machine that vitray may use."""

from __future__ import annotations

import os


def cores() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))
