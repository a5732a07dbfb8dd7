"""Inputs that real users had, on S3 and on Ray: the same rows and counts as on a local disk."""

from __future__ import annotations

from pathlib import Path

from support.user_inputs_elsewhere import check_everywhere


def test_odd_inputs_are_the_same_on_every_store(root: str, tmp_path: Path) -> None:
    check_everywhere(root, tmp_path)
