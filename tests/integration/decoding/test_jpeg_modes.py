"""JPEG decoding in the modes `exact`, `fast` and `draft`, compared with Pillow."""

from __future__ import annotations

import os
import subprocess
import sys

from support.paths import ROOT, TESTS


def test_only_fast_and_draft_import_torch() -> None:
    code = (
        "import sys; from support import encoded_images as t\nfor mode in ('exact', 'fast'):\n"
        "    t.decode(t.items(t.encode(t.photo(), 'JPEG')), t.spec((24, 24), None, mode=mode))\n  "
        "  print('torch' in sys.modules)"
    )
    path = os.pathsep.join([str(TESTS), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
