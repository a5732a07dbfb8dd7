"""Compiled models give the same results, and their compiled code is kept safely."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factories.small_models import make_checkpoint
from support.fast_models import needs_compiler
from support.paths import TESTS
from vitray.models import compile_cache

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()  # its limit of recompilations is one for all models of a process


@needs_compiler
def test_compiled_code_that_was_cut_is_compiled_again_at_the_next_start(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "vit", True)
    env = {name: value for name, value in os.environ.items() if name != compile_cache.CACHE} | {
        "XDG_CACHE_HOME": str(tmp_path)
    }
    code = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from factories.small_models import *
model = open_model(identify(job := job_for({directory!r}, batch_size=8)), ModelOutputs((), 5), "cpu", 2, compiled=True)
print(len(model.compiled))
np.testing.assert_array_equal(model.predict(noise(11)).ids, run(job, noise(11)).ids)
"""
    compiled = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-3000:]
        compiled.append(int(done.stdout))
        if len(compiled) == 1:
            for path in (tmp_path / "vitray" / "compiled").rglob("*.so"):
                path.write_bytes(b"")
    assert compiled[0] > 0 and compiled[1:] == [0, compiled[0]], done.stderr
