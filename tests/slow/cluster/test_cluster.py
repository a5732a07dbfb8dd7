"""A Ray cluster that is not ours: two nodes with token auth on loopback, joined by --address."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path


def test_a_cluster_that_asks_for_no_token_is_refused(
    on_open_cluster: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    refused = on_open_cluster()
    assert refused.returncode == 1 and "answers without a token" in refused.stderr, refused.stderr
    assert not (tmp_path / "out" / "data").exists()
