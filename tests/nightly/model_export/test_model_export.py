"""`vitray export-model` writes a model that gives the original's results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.model_exports import UNSEEN
from vitray.evaluation import agreement


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def test_nncf_sends_no_telemetry(tmp_path: Path, shapes_model: str, photos: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys\nfrom vitray.cli import main\n"
        f"sys.argv = ['vitray', 'export', {shapes_model!r}, '--to', 'openvino', '--int8', "
        f"'--json', '--calibrate', {photos!r}, "
        f"'--into', {str(tmp_path / 'x')!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert sys.modules['nncf'] and not any(sys.modules[m] for m in sys.modules if "
        "m.startswith('openvino_telemetry'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["judgement"]["agreement"] >= 0.95 and done.stderr == ""
    assert not list(home.glob("intel*"))
