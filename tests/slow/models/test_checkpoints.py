"""Checkpoints: where they come from, and that nothing which was not trained, or which could run
code, ever predicts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from factories.small_models import make_checkpoint


def test_hub_ids_come_out_of_the_offline_cache_with_their_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--acme--tiny"
    make_checkpoint(hub / "snapshots" / commit, "vit", True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    code = """
import sys
from vitray.errors import ModelError
from vitray.job import Job
from vitray.models import identify
assert "torch" not in sys.modules and "transformers" not in sys.modules
for model, revision in (("acme/tiny", None), ("acme/tiny", "v9"), ("acme/tinny", None)):
    try:
        print(identify(Job(source=["in"], out="out", model=model, revision=revision, device="cpu", engine="torch")).revision)
    except ModelError as error:
        print(error)
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    known, revision, unknown = done.stdout.splitlines()
    assert known == commit
    assert (
        revision.startswith("model acme/tiny at revision v9 is neither")
        and "HF_HUB_OFFLINE is set" in revision
    )
    assert (
        unknown.startswith("model acme/tinny is neither a local directory nor in the cache")
        and "check the spelling" in unknown
    )
