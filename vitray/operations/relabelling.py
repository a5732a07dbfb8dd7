"""Other labels for a finished dataset, by a linear head over the embeddings that it holds: no image
is read again.

The new dataset has the shards, rows, errors and vectors of the old one. Like a run, the call does
what is missing, and is safe to repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from vitray.dataset import (
    Dataset,
    Footer,
    check_data,
    check_store,
    commit_rows,
    committed,
    copy_groups,
    data_files,
    dataset_url,
    finish,
    forget,
    matrix_of,
    read_footer,
    read_manifest,
    require_complete,
    require_outside,
    resolve_dataset,
    row_blocks,
    shard_of,
)
from vitray.errors import JobError, count
from vitray.job import PROMPT
from vitray.models.head import Head
from vitray.models.labelling import read_own_head
from vitray.schema import LABEL_FIELDS, VectorColumn
from vitray.storage import absolute, exists


@dataclass(frozen=True, slots=True)
class Relabelling:
    """What was made. column: the embedding that was read; written: data files made by this call."""

    into: str
    column: str
    shards: int
    written: int
    rows: int
    errors: int

    def __str__(self) -> str:
        return (
            f"{self.into}: {count(self.shards, 'shard')} relabelled by {self.column}, "
            f"{self.written} of them now, "
            f"{count(self.rows, 'row')}, {count(self.errors, 'error')}"
        )


def relabel(out: str, head: str, into: str) -> Relabelling:
    """The dataset `out` with the labels of a head, as a dataset of its own in `into`.

    Raises JobError when `out` is not complete or lacks the embedding that the head reads,
    ModelError for a head of another model, FingerprintError when `into` belongs to another job.
    """
    old, into, url = require_complete(out), absolute(into), absolute(head)
    require_outside(old, "--into", into)
    chosen = read_own_head(url, old.spec)
    column = _column_for(old, chosen, url)
    spec = replace(old.spec, labels=chosen.labels, multi_label=False, prompts=(), text_sha256="")
    spec = replace(spec, head=url, head_sha256=chosen.sha256(), head_column=column.column)
    job = old.job.model_copy(update={"out": into, "labels": True, "prompts": [PROMPT], "head": url})
    if not exists(dataset_url(into)):
        check_store(into)
    new = resolve_dataset(
        job,
        spec,
        list(old.vectors),
        old.passthrough,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    check_data(new)
    copy_groups(old.out, into)
    files = {shard_of(source): source for source in data_files(old.out)}
    done = committed(into)
    before, now = _counts(into), _counts(old.out)
    odd = sorted(
        s
        for s in files.keys() & done.keys()
        if before.get(s) != now.get(s) or before.get(s, (0, 1))[1]
    )
    if redone := [s for s in odd if _differ(read_footer(files[s]), read_footer(done[s].url))]:
        forget(new, redone)
    pending = files.keys() - committed(into).keys()
    for shard in sorted(pending):
        commit_rows(new, read_footer(files[shard]), _relabelled(old, new, files[shard], chosen))
    ledger = finish(new, lambda: (list(files), list(files)), prune=True)
    return Relabelling(into, column.column, ledger.shards, len(pending), ledger.rows, ledger.errors)


def _counts(out: str) -> dict[str, tuple[int, int]]:
    """Rows and errors by shard, as far as the manifest knows."""
    manifest = read_manifest(out)
    return (
        {}
        if manifest is None
        else {row["shard"]: (row["rows"], row["errors"]) for row in manifest.to_pylist()}
    )


def _differ(old: Footer, new: Footer) -> bool:
    return (old.rows, old.errors, old.error_rows) != (new.rows, new.errors, new.error_rows)


def _column_for(dataset: Dataset, head: Head, url: str) -> VectorColumn:
    def said(layer: int | None, pool: str, normalize: bool) -> str:
        return f"layer {layer or 'last'}, pool {pool}, normalize {str(normalize).lower()}"

    wanted = (head.layer, head.pool, head.normalize)
    there = {(v.layer, v.pool, v.normalize): v for v in dataset.vectors}
    if wanted not in there:
        known = "; ".join(f"{vector.column}: {said(*spec)}" for spec, vector in there.items())
        raise JobError(
            f"head {url} reads {said(*wanted)}, and {dataset.out} has {known or 'no embeddings'}. "
            f"Make a head for one of these, or run "
            "the job with head: and another `out`."
        )
    return there[wanted]


def _relabelled(old: Dataset, new: Dataset, source: str, head: Head) -> Iterator[pa.Table]:
    labels = {field.name for field in LABEL_FIELDS}
    for table in row_blocks(
        old, [source], [name for name in new.schema.names if name not in labels]
    ):
        scores = _scores(matrix_of(table[new.spec.head_column]), head)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, : new.job.top_k].astype(np.int32)
        for name, values in new.label_columns(ids, np.take_along_axis(scores, ids, 1)).items():
            table = table.append_column(name, values)
        yield table


def _scores(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Softmax in float32 of vectors [N, D]: [N, C]."""
    logits = vectors.astype(np.float32) @ head.weight.T + head.bias
    chances = np.exp(logits - logits.max(1, keepdims=True))
    found: np.ndarray = chances / chances.sum(1, keepdims=True)
    return found
