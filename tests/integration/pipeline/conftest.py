"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.local_runs import dataset
from support.runs import inputs
from support.whole_runs import items

__all__ = ["dataset", "inputs", "items"]
