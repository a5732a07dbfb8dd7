"""A path is in one group of loose files, whichever runs append."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from support.dataset_parts import errors_of, input_shard, make, rows_of
from vitray.dataset import RowsDigest, commit_shard, read_footer, write_end, write_fragment
from vitray.schema import End


def test_row_groups_are_of_the_size_that_was_measured(local_out: str) -> None:
    dataset = make(local_out, fragment_rows=8192)
    shard = input_shard(local_out)
    rows = rows_of(dataset, shard.id, range(8192))
    for n in range(3):
        index = pa.array(range(8192 * n, 8192 * (n + 1)), pa.int32())
        part = rows.set_column(2, dataset.schema.field("index"), index)
        write_fragment(dataset, shard.id, (8192 * n, 8192 * (n + 1)), part, errors_of(shard.id, {}))
    write_end(dataset, shard.id, End(3 * 8192))
    commit_shard(dataset, shard)
    meta = pq.read_metadata(dataset.data_url(shard.id))
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [16_384, 8_192]
    digest = RowsDigest()
    for batch in pq.ParquetFile(dataset.data_url(shard.id)).iter_batches(batch_size=5000):
        digest.add(pa.Table.from_batches([batch]))
    assert digest.hexdigest() == read_footer(dataset.data_url(shard.id)).rows_sha256
