"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.source_files import whole_tar

__all__ = ["whole_tar"]
