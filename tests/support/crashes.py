"""Runs that die at a named point, and the rows that must come out all the same."""

from __future__ import annotations

import pyarrow as pa

import vitray


def rows_of(out: str) -> pa.Table:
    return vitray.read(out).sort_by([("shard", "ascending"), ("index", "ascending")])
