"""The check for GPU machines runs here, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

HOME = ROOT


def test_the_command_for_a_gpu_machine_runs_here(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/gpu_check.py",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    failed = {name: said["error"] for name, said in report["sections"].items() if "error" in said}
    assert failed == {}, failed
    assert report["sections"]["equality"]["bf16"]["cosine"] > 0.99
    assert report["sections"]["ring"]["equal"] is True
    assert report["sections"]["jpeg"]["bad_rows_agree"] is True
    by_processes = report["sections"]["decoder_processes"]["processes"]
    assert by_processes["copies_per_image"] == 0 and by_processes["images_s"] > 0
    assert by_processes["lock_ms_per_image"] >= 0
