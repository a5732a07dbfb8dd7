"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.submissions import head, job_file

__all__ = ["head", "job_file"]
