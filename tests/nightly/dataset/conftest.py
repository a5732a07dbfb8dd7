"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.dataset_parts import out

__all__ = ["out"]
