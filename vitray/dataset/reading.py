"""Reading a dataset back: the rows that the manifest admits, in order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from vitray.dataset.files import read_table
from vitray.dataset.ledger import base_of, committed, read_manifest, version_of
from vitray.errors import SourceError
from vitray.storage import absolute, join, store_for


def data_files(out: str) -> list[str]:
    """The URLs of the data files that count, in the order of shard ids: one version of each input, the manifest's if it has one."""
    data, manifest = committed(absolute(out)), read_manifest(absolute(out))
    named = [] if manifest is None else [str(shard) for shard in manifest["shard"].to_pylist() if shard in data]
    versions = {base_of(shard): version_of(shard) for shard in [*sorted(data), *named]}
    admitted = [shard for shard in sorted(data) if versions[base_of(shard)] == version_of(shard)]
    return [join(absolute(out), "data", f"{shard}.parquet") for shard in admitted]


def read(out: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Every good row of a dataset as one table, ordered by (shard, index). Raises SourceError when there is none.

    columns: the ones to read, e.g. ["key", "label", "embedding"]; all when None.
    """
    urls = data_files(out)
    if not urls:
        raise SourceError(f"{out} holds no committed shard. Run a job into it first, or check the path.")

    def one(url: str) -> pa.Table:
        with store_for(url).open(url) as stream:
            return read_table(stream, columns)

    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(one, urls))
    return pa.concat_tables(tables).replace_schema_metadata(None).unify_dictionaries()
