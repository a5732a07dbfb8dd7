"""A trial: label the first images of a source, in a folder of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitray.arrow_types import with_type
from vitray.dataset import read, read_errors, require_dataset
from vitray.errors import SourceError, count
from vitray.job import Job
from vitray.pipeline import Result, list_source, prepare_job
from vitray.schema import Encoded, Shard, passthrough_table
from vitray.sources import passthrough_schema, read_shard, select_shards

IMAGE, KEY = "vitray_image", "vitray_key"  # columns of the sample
SHOWN_KEY = 40  # characters of a key in the table


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of a trial.

    out: the dataset that it made, in a scratch folder. rows: for each image its key, and its label
    and score or, for a bad image, the reason; in the order of the source. exit_code: of the run.
    """

    out: str
    images: int
    errors: int
    seconds: float
    exit_code: int
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        width = min(SHOWN_KEY, max((len(row["key"]) for row in self.rows), default=0))
        return "\n".join(
            [
                *(_line(row, width) for row in self.rows),
                f"tried {count(self.images, 'image')} in {self.seconds:.1f} s, "
                f"{count(self.errors, 'error')}",
                f"dataset: {self.out} (delete {os.path.dirname(self.out)} when you are done)",
            ]
        )


def try_job(job: Job, images: int, run_job: Callable[[Job], Result]) -> Trial:
    """Label the first `images` of the job's source into its `out`, a local path.

    A copy of the images is written beside it, so that the folder above is a dataset and its source.
    run_job: runs a job. Raises like `run`, and SourceError for a source without images.
    """
    sample = _write_sample(prepare_job(job), images)
    result = run_job(sample)
    rows = _rows_of(result.out)
    return Trial(
        out=result.out,
        images=len(rows),
        errors=sum("reason" in row for row in rows),
        seconds=result.seconds,
        exit_code=int(result.exit_code),
        rows=rows,
    )


def _write_sample(job: Job, images: int) -> Job:
    """Write the first images to a Parquet file. Returns the job that reads them from there."""
    shards = select_shards(list_source(job).shards, job)
    sample = list(islice(_encoded(shards, job), images))
    if not sample:
        raise SourceError(f"{', '.join(job.source)} holds no image. Check `source` and `format`.")
    table = pa.table(
        {
            KEY: pa.array([image.key for image in sample], pa.string()),
            IMAGE: pa.array([image.data for image in sample], pa.large_binary()),
            **_passthrough(sample, shards, job),
        }
    )
    source = os.path.join(os.path.dirname(job.out), "images.parquet")
    pq.write_table(table, source)
    changes = {
        "source": [source],
        "format": "parquet",
        "image_column": IMAGE,
        "key_column": KEY,
        "image_member": None,
        "allow": [],
        "since": None,
        "sample": None,
        "limit": None,
        "max_error_rate": 1.0,
    }
    return job.model_copy(update=changes)


def _encoded(shards: Sequence[Shard], job: Job) -> Iterator[Encoded]:
    for shard in shards:
        for item in read_shard(shard, job, lambda _: True):
            if isinstance(item, Encoded):
                yield item


def _passthrough(
    sample: Sequence[Encoded], shards: Sequence[Shard], job: Job
) -> dict[str, pa.ChunkedArray]:
    """The passthrough columns of the images, by their names in the source."""
    if not job.keep:
        return {}
    schema = passthrough_schema(shards, job)
    rows = [image.passthrough for image in sample if image.passthrough is not None]
    table = passthrough_table(rows, schema)
    return {
        name: with_type(table.column(n), field.type)
        for n, (name, field) in enumerate(zip(job.keep, schema))
    }


def _rows_of(out: str) -> list[dict[str, Any]]:
    """The rows and error rows of a dataset, in the order of its only shard."""
    dataset = require_dataset(out)
    columns = ["index", "key", *(["label", "score"] if dataset.job.labelled else [])]
    good = read(out, columns=columns).to_pylist()
    bad = read_errors(dataset).select(["index", "key", "reason", "message"]).to_pylist()
    rows = sorted([*good, *bad], key=lambda row: row["index"])
    return [{name: value for name, value in row.items() if name != "index"} for row in rows]


def _line(row: dict[str, Any], width: int) -> str:
    key = row["key"]
    shown = key if len(key) <= width else f"…{key[1 - width :]}"
    if "reason" in row:
        return f"{shown:<{width}}  {row['reason']}: {row['message']}"
    if "label" not in row:
        return f"{shown:<{width}}  embedded"
    return f"{shown:<{width}}  {row['score']:.3f}  {row['label']}"
