"""What `plan --probe` says: the arithmetic, prices, and that it comes true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from factories.shards import pictures, put_tars
from vitray.operations.planning import status

VITRAY = [sys.executable, "-m", "vitray"]


def test_a_run_that_was_planned_to_do_nothing_says_what_it_did(
    shapes_model: str, tmp_path: Path
) -> None:
    """Something came after the plan."""
    put_tars(f"{tmp_path}/in", pictures(16), 1, tmp_path)
    (tmp_path / "plan.json").write_text('{"images": 0, "seconds": 0.0}')
    job = [
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--out",
        f"{tmp_path}/out",
        "--set",
        "engine=torch",
    ]
    done = subprocess.run(
        [*VITRAY, "run", *job, "--planned", f"{tmp_path}/plan.json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "out" / "_vitray" / "runs").glob("*.json")
    assert json.loads(record.read_text())["planned"] == {"images": 0, "seconds": 0.0}
    assert "\nplanned " not in str(status(f"{tmp_path}/out"))
