"""resize equals Pillow in every bit, whatever the sizes; without Numba, or with no folder for what
it compiles, too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.resizing import by_pillow

RESIZED = """
import sys
{before}
import numpy as np
from vitray.decoding.resize import compiled, resize
sys.stdout.buffer.write(resize(np.arange(60000, dtype=np.uint16).astype(np.uint8).reshape(100, 200, 3), (64, 32), 2).tobytes())
assert compiled() is not {without}
"""


@pytest.mark.parametrize(
    ("before", "without"),
    [("sys.modules['numba'] = None", True), ("", False)],
    ids=["without numba", "no folder for what it compiles"],
)
def test_what_numba_cannot_do_here_costs_no_bit(before: str, without: bool, tmp_path: Path) -> None:
    package = tmp_path / "site"
    package.mkdir()
    for part in (package / "vitray", package / "vitray" / "__pycache__", package / "nowhere"):
        part.touch() if part.name != "vitray" else part.mkdir()
    for name in (
        "__init__.py",
        "resize.py",
    ):  # the folder that numba would use cannot be made: a file has its name
        source = (
            Path(sys.modules["vitray.decoding.resize"].__file__ or "").read_bytes()
            if name == "resize.py"
            else b""
        )
        (package / "vitray" / name).write_bytes(source)
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "HOME": str(package / "nowhere"),
        "XDG_CACHE_HOME": str(package / "nowhere"),
    }
    script = RESIZED.format(before=before, without=without)
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=package,
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    pixels = np.arange(60000, dtype=np.uint16).astype(np.uint8).reshape(100, 200, 3)
    assert run.stdout == by_pillow(pixels, (64, 32), 2).tobytes()


def test_what_one_process_compiled_the_next_one_takes(tmp_path: Path) -> None:
    """Else each start compiles for a second or two, and leaves a file in the installation."""
    kept = []
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONHASHSEED": seed,
        }
        code = "from vitray.decoding.resize import compiled; assert compiled()"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
        kept.append({path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.nb?")})
    assert len(kept[0]) == 4 and kept[1] == kept[0]  # code and index of two passes
