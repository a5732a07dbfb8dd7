"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.dataset_parts import behind, local_out, out, proxy, quick_out
from support.old_datasets import bucket

__all__ = ["behind", "bucket", "local_out", "out", "proxy", "quick_out"]
