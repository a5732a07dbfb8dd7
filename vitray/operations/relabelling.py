"""New labels for a complete dataset, by a linear head over its embeddings. Reads no image.

The new dataset has the shards, rows, errors and vectors of the old one. Like a run, the call does
what is missing, and is safe to repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vitray.clock import utc_now
from vitray.dataset import (
    Dataset,
    Footer,
    check_store,
    commit_rows,
    committed_files,
    copy_groups,
    data_files,
    dataset_url,
    delete_data_files,
    matrix_of,
    read_footer,
    read_manifest,
    require_complete,
    require_outside,
    require_own_data_files,
    resolve_dataset,
    row_blocks,
    shard_of,
    write_manifest,
)
from vitray.errors import JobError, count
from vitray.job import PROMPT
from vitray.models.linear_head import Head, read_head_for
from vitray.schema import LABEL_FIELDS, VectorColumn
from vitray.storage import absolute, exists
from vitray.vectors import top_k


@dataclass(frozen=True, slots=True)
class Relabelling:
    """What was made. column: the embedding that was read; written: data files of this call."""

    into: str
    column: str
    shards: int
    written: int
    rows: int
    errors: int

    def __str__(self) -> str:
        shards = f"{count(self.shards, 'shard')} relabelled by {self.column}"
        rows = f"{count(self.rows, 'row')}, {count(self.errors, 'error')}"
        return f"{self.into}: {shards}, {self.written} of them now, {rows}"


def relabel(out: str, head: str, into: str) -> Relabelling:
    """The dataset `out` with the labels of a head, as a separate dataset in `into`.

    Raises JobError if `out` is not complete or lacks the embedding that the head reads. Raises
    ModelError for a head of another model, and FingerprintError if `into` belongs to another job.
    """
    old = require_complete(out)
    into = absolute(into)
    require_outside(old, "--into", into)
    head_url = absolute(head)
    linear_head = read_head_for(head_url, old.spec)
    column = _column_for(old, linear_head, head_url)
    new = _new_dataset(old, into, linear_head, head_url, column)
    require_own_data_files(new)
    copy_groups(old.out, into)
    sources = {shard_of(url): url for url in data_files(old.out)}
    if outdated := _outdated(sources, old.out, into):
        delete_data_files(new, outdated)
    pending = sources.keys() - committed_files(into).keys()
    for shard in sorted(pending):
        source = sources[shard]
        commit_rows(new, read_footer(source), _relabelled(old, new, source, linear_head))
    ledger = write_manifest(new, lambda: (list(sources), list(sources)), prune=True)
    return Relabelling(
        into=into,
        column=column.column,
        shards=ledger.shards,
        written=len(pending),
        rows=ledger.rows,
        errors=ledger.errors,
    )


def _new_dataset(
    old: Dataset, into: str, head: Head, head_url: str, column: VectorColumn
) -> Dataset:
    spec = replace(
        old.spec,
        labels=head.labels,
        multi_label=False,
        prompts=(),
        text_sha256="",
        head=head_url,
        head_sha256=head.sha256(),
        head_column=column.column,
    )
    job = old.job.model_copy(
        update={"out": into, "labels": True, "prompts": [PROMPT], "head": head_url}
    )
    if not exists(dataset_url(into)):
        check_store(into)
    started = utc_now()
    return resolve_dataset(job, spec, list(old.vectors), old.passthrough, started)


def _outdated(sources: dict[str, str], out: str, into: str) -> list[str]:
    """Shards whose data file in `into` has other rows or errors than the one in `out`."""
    existing = committed_files(into)
    old_counts = _counts(out)
    new_counts = _counts(into)
    outdated = []
    for shard in sorted(sources.keys() & existing.keys()):
        counts = new_counts.get(shard)
        # equal counts without errors are enough; else the footers have the error rows
        if counts is not None and counts == old_counts.get(shard) and counts.errors == 0:
            continue
        if _differ(read_footer(sources[shard]), read_footer(existing[shard].url)):
            outdated.append(shard)
    return outdated


class _Counts(NamedTuple):
    """What the manifest has of a shard."""

    rows: int
    errors: int


def _counts(out: str) -> dict[str, _Counts]:
    """Rows and errors by shard, of those in the manifest."""
    manifest = read_manifest(out)
    if manifest is None:
        return {}
    return {row["shard"]: _Counts(row["rows"], row["errors"]) for row in manifest.to_pylist()}


def _differ(old: Footer, new: Footer) -> bool:
    return (old.rows, old.errors, old.error_rows) != (new.rows, new.errors, new.error_rows)


def _column_for(dataset: Dataset, head: Head, head_url: str) -> VectorColumn:
    """The vector column that the head reads. Raises JobError if the dataset lacks it."""
    head_input = (head.layer, head.pool, head.normalize)
    for vector in reversed(dataset.vectors):  # datasets have always used the last of equal ones
        if (vector.layer, vector.pool, vector.normalize) == head_input:
            return vector
    columns = "; ".join(f"{vector.column}: {_described(vector)}" for vector in dataset.vectors)
    raise JobError(
        f"head {head_url} reads {_described(head)}, "
        f"and {dataset.out} has {columns or 'no embeddings'}. "
        "Make a head for one of these, or run the job with head: and another `out`."
    )


def _described(vectors: VectorColumn | Head) -> str:
    layer = vectors.layer or "last"
    return f"layer {layer}, pool {vectors.pool}, normalize {str(vectors.normalize).lower()}"


def _relabelled(old: Dataset, new: Dataset, source: str, head: Head) -> Iterator[pa.Table]:
    label_names = {field.name for field in LABEL_FIELDS}
    columns = [name for name in new.schema.names if name not in label_names]
    for table in row_blocks(old, [source], columns):
        scores = _scores(matrix_of(table[new.spec.head_column]), head)
        best_scores, ids = top_k(scores, new.job.top_k)
        for name, values in new.label_columns(ids.astype(np.int32), best_scores).items():
            table = table.append_column(name, values)
        yield table


def _scores(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Softmax in float32 of the head's logits: vectors [N, D] -> [N, C]."""
    logits = vectors.astype(np.float32) @ head.weight.T + head.bias
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    scores: np.ndarray = exponentials / exponentials.sum(1, keepdims=True)
    return scores
