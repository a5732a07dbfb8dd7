"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.page_runs import demo_folder, tutorial

__all__ = ["demo_folder", "tutorial"]
