"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.public_buckets import mock_bucket

__all__ = ["mock_bucket"]
