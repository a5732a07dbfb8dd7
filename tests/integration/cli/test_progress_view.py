"""The progress of a run in a process: JSON lines without a terminal, a view on one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from factories.shards import pictures, put_tars
from support.schemas import checked

VITRAY = [sys.executable, "-m", "vitray"]


def test_without_a_terminal_a_run_prints_json_lines(shapes_model: str, tmp_path: Path) -> None:
    put_tars(f"{tmp_path}/in", pictures(60), 2, tmp_path)
    argv = [
        *VITRAY,
        "--log-format",
        "json",
        "run",
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--out",
        f"{tmp_path}/out",
    ]
    done = subprocess.run(
        [*argv, "--set", "engine=auto"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    lines = [checked(line) for line in done.stderr.splitlines()]
    reports = [line for line in lines if line["schema"] == "vitray/progress/v1"]
    assert reports[0]["phase"] == "starting"
    assert reports[-1]["shards_done"] == 2 and reports[-1]["images"] == 60
    assert {line["schema"] for line in lines} <= {"vitray/progress/v1", "vitray/log/v1"}


def test_on_a_terminal_a_run_draws_a_view_and_restores_the_cursor(
    shapes_model: str, tmp_path: Path
) -> None:
    put_tars(f"{tmp_path}/in", pictures(60), 2, tmp_path)
    argv = [
        *VITRAY,
        "run",
        f"{tmp_path}/in",
        "--model",
        shapes_model,
        "--set",
        "engine=torch",
        "--out",
        f"{tmp_path}/out",
    ]
    master, terminal = pty.openpty()
    with subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(terminal)
        output = b""
        while True:
            try:
                output += os.read(master, 65536)
            except OSError:  # the other side was closed
                break
        assert process.wait(240) == 0
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    assert "2 of 2 done, 0 staged in part, 0 set aside" in text and "60" in text
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l")
