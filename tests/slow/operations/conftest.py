"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.bench_inputs import inputs

__all__ = ["inputs"]
