"""Bad usage, help, versions, tracebacks, and text that must not reach the terminal raw."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import ESCAPE, raw, subprocess_vitray


@pytest.mark.parametrize("at", [0, 1, 2])
def test_debug_shows_the_traceback_anywhere_on_the_line(tmp_path: Path, at: int) -> None:
    argv = ["plan", f"{tmp_path}/{ESCAPE}.yaml"]
    argv.insert(at, "--debug")
    done = subprocess_vitray(*argv)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("JobError: cannot read the job file")
    assert raw(done.stderr) == []


def test_without_debug_there_is_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess_vitray("plan", f"{tmp_path}/no.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
