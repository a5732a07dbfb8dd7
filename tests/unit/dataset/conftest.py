"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.dataset_parts import local_out, out

__all__ = ["local_out", "out"]
