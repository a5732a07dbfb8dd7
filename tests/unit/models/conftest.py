"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.linear_heads import job, vit
from support.text_towers import clip, towers

__all__ = ["clip", "job", "towers", "vit"]
