"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.user_inputs import cli

__all__ = ["cli"]
