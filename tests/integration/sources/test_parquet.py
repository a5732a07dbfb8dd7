"""Parquet sources: row groups, the image column, passthrough columns, broken files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

READ_ALL = """
import os, sys, time
from vitray.job import make_job
from vitray.sources import file_passthrough_schema, list_shards, read_shard
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
def settled():  # a joined thread stays listed for a moment, one of a pool for ever
    return any(threads() == before or time.sleep(0.05) for _ in range(100))
for source in sys.argv[1:]:
    job = make_job({"source": source, "model": "m", "out": "o", "keep": ["n"]})
    for shard in list_shards(job, []).shards:
        file_passthrough_schema(shard, job)
        items = read_shard(shard, job, lambda index: True)
        next(items)
        assert shard.kind == "manifest" or settled(), "pyarrow started a thread"
        assert len(list(items)) == 100 and settled()
"""


def test_parquet_is_read_by_the_calling_thread_alone(tmp_path: Path) -> None:
    """A pyarrow thread with a Python buffer at the end of the interpreter aborts the process."""
    values = [os.urandom(1000) for _ in range(100)]
    pq.write_table(
        pa.table({"image": values, "n": range(100)}), tmp_path / "a.parquet", row_group_size=40
    )
    pq.write_table(
        pa.table({"path": ["none.jpg"] * 100, "n": range(100)}),
        tmp_path / "m.parquet",
        row_group_size=40,
    )
    argv = [
        sys.executable,
        "-c",
        READ_ALL,
        str(tmp_path / "a.parquet"),
        str(tmp_path / "m.parquet"),
    ]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=60).stderr == ""
