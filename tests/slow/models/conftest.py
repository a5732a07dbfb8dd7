"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.linear_heads import vit
from support.text_towers import towers

__all__ = ["towers", "vit"]
