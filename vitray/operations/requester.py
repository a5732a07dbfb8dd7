"""Who asks for a change, as records store it."""

from __future__ import annotations

import getpass
import os
import socket


def default_requester() -> str:
    """user@host of this process; the number of a user without a name."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without this user
        user = f"uid-{os.getuid()}"
    return f"{user}@{socket.gethostname()}"
