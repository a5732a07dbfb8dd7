"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.bench_inputs import inputs
from support.command_line import dataset, vitray
from support.linear_heads import job, vit

__all__ = ["dataset", "inputs", "job", "vit", "vitray"]
