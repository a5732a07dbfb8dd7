"""The next dataset: the same input through another model, beside the one that is there."""

from __future__ import annotations

import re

from vitray.dataset import copy_groups, open_dataset, with_source_rules
from vitray.errors import JobError
from vitray.job import Job
from vitray.storage import absolute


def next_job(job: Job, model: str, out: str | None = None, revision: str | None = None) -> Job:
    """The job with another model, into `out` (default: job.out with the model's name behind it).

    Loose files get the groups that job.out has, so that both datasets have the same shards. Raises
    JobError where job.out holds none.
    """
    if open_dataset(job.out) is None:
        raise JobError(
            f"{absolute(job.out)} holds no vitray dataset to go on from. Check `out`, or run the "
            f"job first."
        )
    if out is None and re.fullmatch(r"s3://[^/]+/*", job.out):
        raise JobError(
            f"{job.out} is a whole bucket, and beside it is somebody else's: say where the new "
            f"dataset goes with --out."
        )
    beside = out or f"{job.out.rstrip('/')}-{_name_of(model)}"
    if absolute(beside) == absolute(job.out):
        raise JobError(f"--out {beside} is the dataset that is there: choose another directory.")
    copy_groups(job.out, beside)
    return with_source_rules(job).model_copy(
        update={"model": model, "revision": revision, "out": beside}
    )


def _name_of(model: str) -> str:
    return (
        re.sub(r"[^A-Za-z0-9.]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "next"
    )
