"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.local_runs import dataset

__all__ = ["dataset"]
