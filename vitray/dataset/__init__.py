"""The output directory: what it is, what is in it, and how a shard comes to be in it exactly once.

identity.py   dataset.json: fingerprint and frozen values     resolve.py   the dataset that a job goes on with
staging.py    fragments of shards that are not whole yet      files.py     the other files: groups, run records
commit.py     fragments -> the one data file of a shard       ledger.py    what is committed: manifest, _SUCCESS, redo
"""

from vitray.dataset.commit import Commit, Footer, RowsDigest, commit_rows, commit_shard, parquet_of, read_footer
from vitray.dataset.files import (
    NO_GROUP,
    append_group_log,
    go_on_with_groups,
    load_group_log,
    read_run_records,
    read_table,
    write_run_record,
)
from vitray.dataset.identity import Dataset, dataset_url, open_dataset, package_versions, remember_source
from vitray.dataset.ledger import (
    Ledger,
    base_of,
    check_data,
    clean,
    committed,
    finish,
    forget,
    read_manifest,
    shard_of,
    shards_to_redo,
    unmark_success,
)  # fmt: skip
from vitray.dataset.reading import (
    choose_vector,
    data_files,
    is_complete,
    matrix_of,
    read,
    read_errors,
    require_complete,
    require_dataset,
    require_outside,
    row_blocks,
    row_counts,
    rows_in,
)  # fmt: skip
from vitray.dataset.resolve import COMPACTED, resolve_dataset, with_frozen
from vitray.dataset.staging import read_fragment, staged, staged_shards, staged_whole, write_end, write_fragment

__all__ = [
    "COMPACTED", "NO_GROUP", "Commit", "Dataset", "Footer", "Ledger", "RowsDigest", "append_group_log", "base_of", "check_data", "choose_vector", "clean", "commit_rows", "commit_shard", "committed",
    "data_files", "dataset_url", "finish", "forget", "go_on_with_groups", "is_complete", "load_group_log", "matrix_of", "open_dataset", "package_versions", "parquet_of", "read", "read_errors", "read_footer",
    "read_fragment", "read_manifest", "read_run_records", "read_table", "remember_source", "require_complete", "require_dataset", "require_outside", "resolve_dataset",
    "row_blocks", "row_counts", "rows_in", "shard_of", "shards_to_redo", "staged", "staged_shards", "staged_whole", "unmark_success", "with_frozen", "write_end", "write_fragment", "write_run_record",
]  # fmt: skip
