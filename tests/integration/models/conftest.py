"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.text_towers import clip, towers

__all__ = ["clip", "towers"]
