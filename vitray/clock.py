"""The current time, as vitray stores it."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> str:
    """The current time in ISO format, in UTC and to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
