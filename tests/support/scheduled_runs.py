"""Commands of a nightly job over a growing source."""

from __future__ import annotations

import os
import time
from pathlib import Path


def put(folder: Path, name: str, data: bytes, days_ago: float = 0) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.tar"
    path.write_bytes(data)
    then = time.time() - 86400 * days_ago
    os.utime(path, (then, then))
