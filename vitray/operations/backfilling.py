"""The next dataset: the same input through another model, beside the existing dataset."""

from __future__ import annotations

import re

from vitray.dataset import copy_groups, copy_removed_keys, open_dataset, with_source_rules
from vitray.errors import JobError
from vitray.job import Job
from vitray.storage import absolute


def next_job(job: Job, model: str, out: str | None = None, revision: str | None = None) -> Job:
    """The job with another model, into `out` (default: job.out with the model's name appended).

    Loose files get the groups of the dataset in job.out, so that both datasets have the same
    shards. Keys that were removed there stay removed. Raises JobError if job.out holds no dataset.
    """
    if open_dataset(job.out) is None:
        raise JobError(
            f"{absolute(job.out)} holds no vitray dataset to continue from. "
            "Check `out`, or run the job first."
        )
    if out is None and re.fullmatch(r"s3://[^/]+/*", job.out):
        raise JobError(
            f"{job.out} is a whole bucket, and another bucket may not be yours: "
            "name the directory of the new dataset with --out."
        )
    next_out = out or f"{job.out.rstrip('/')}-{_name_of(model)}"
    if absolute(next_out) == absolute(job.out):
        raise JobError(f"--out {next_out} is the existing dataset: choose another directory.")
    copy_groups(job.out, next_out)
    copy_removed_keys(absolute(job.out), absolute(next_out))
    return with_source_rules(job).model_copy(
        update={"model": model, "revision": revision, "out": next_out}
    )


def _name_of(model: str) -> str:
    """The last part of a model's id or path, as the end of a directory's name."""
    base = model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9.]+", "-", base).strip("-.") or "next"
