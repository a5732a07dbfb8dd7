"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.clusters import cluster
from support.runs import inputs
from support.whole_runs import items

__all__ = ["cluster", "inputs", "items"]
