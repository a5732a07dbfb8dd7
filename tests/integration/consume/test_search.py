"""vitray search: what is nearest is what numpy says, whatever the keys, the blocks and the ties."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from factories import embedded
from factories.embedded import HOSTILE, noise
from support.schemas import checked


def test_the_command_prints_rows_and_json(tmp_path: Path) -> None:
    dataset = embedded.make(tmp_path, [noise(9, keys=HOSTILE)])
    argv = [sys.executable, "-m", "vitray", "search", dataset.out, "--key", HOSTILE[0], "--k", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and "9 rows, exact" in lines[0]
    assert lines[1].startswith("  1.0000  'two\\nlines'  (s_000-") and lines[1].endswith(
        ", 0)  cat 0.750"
    )
    printed = checked(
        subprocess.run([*argv, "--json"], capture_output=True, text=True, timeout=60).stdout
    )
    assert printed["neighbours"][0]["key"] == HOSTILE[0] and printed["neighbours"][0][
        "cosine"
    ] == pytest.approx(1, abs=1e-6)
    assert printed["recall"] is None and len(printed["neighbours"]) == 2
