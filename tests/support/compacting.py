"""Rows and parts of a dataset that `vitray compact` gathers."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.storage import store_for

IN_ONE = 256
EACH_ALONE = 0  # megabytes


def rows_of(into: str) -> pa.Table:
    urls = [info.url for info in store_for(into).find(into) if info.url.endswith(".parquet")]
    tables = []
    for url in urls:
        with store_for(url).open(url) as stream:
            tables.append(pq.read_table(stream))
    return pa.concat_tables(tables).replace_schema_metadata(None).unify_dictionaries()
