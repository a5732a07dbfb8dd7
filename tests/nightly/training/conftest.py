"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.digit_trainings import home

__all__ = ["home"]
