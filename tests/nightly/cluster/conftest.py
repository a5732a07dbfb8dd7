"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.clusters import cluster, on_open_cluster
from support.digit_trainings import home
from support.runs import inputs
from support.submissions import head, job_file

__all__ = ["cluster", "head", "home", "inputs", "job_file", "on_open_cluster"]
