"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.clusters import cluster, on_open_cluster
from support.local_runs import dataset
from support.runs import inputs
from support.submissions import head, job_file
from support.training_runs import small
from support.whole_runs import items

__all__ = ["cluster", "dataset", "head", "inputs", "items", "job_file", "on_open_cluster", "small"]
