"""Where vitray keeps files of its own in the user's cache."""

from __future__ import annotations

import os


def cache_directory(name: str) -> str:
    """vitray's own directory of that name in the user's cache; it is created if necessary."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = os.path.join(root, "vitray", name)
    os.makedirs(path, 0o755, exist_ok=True)
    return path
