"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.model_exports import photos, small, unseen

__all__ = ["photos", "small", "unseen"]
