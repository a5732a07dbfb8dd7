"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.training_runs import small, trained

__all__ = ["small", "trained"]
