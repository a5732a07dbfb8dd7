"""What a signal does to a command, by what the command is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitray.cli.interrupts import Action, InterruptPolicy, Phase

FILES, SAFE, WRITING = Phase.TEMPORARY_FILES, Phase.CRASH_SAFE, Phase.WRITING
TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    ("phase", "number", "is_ray_loaded", "action"),
    [
        (FILES, TERM, False, Action.CLEAN_UP),
        (FILES, INT, False, Action.CLEAN_UP),
        (FILES, HUP, False, Action.CLEAN_UP),
        (FILES, TERM, True, Action.EXIT),
        (FILES, INT, True, Action.EXIT),
        (SAFE, TERM, False, Action.EXIT),
        (SAFE, INT, True, Action.EXIT),
        (WRITING, TERM, False, Action.FINISH_WRITES),
        (WRITING, TERM, True, Action.FINISH_WRITES),
        (WRITING, INT, False, Action.EXIT),
        (WRITING, HUP, True, Action.EXIT),
    ],
)
def test_the_first_signal_does_what_costs_least(
    phase: Phase, number: int, is_ray_loaded: bool, action: Action
) -> None:
    policy = InterruptPolicy(phase)
    assert policy.action(number, is_first=True, is_ray_loaded=is_ray_loaded) is action


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("number", [TERM, INT, HUP])
@pytest.mark.parametrize("is_ray_loaded", [False, True])
def test_a_second_signal_ends_the_process(phase: Phase, number: int, is_ray_loaded: bool) -> None:
    policy = InterruptPolicy(phase)
    assert policy.action(number, is_first=False, is_ray_loaded=is_ray_loaded) is Action.EXIT


def test_each_listener_is_called_once_within_its_own_block() -> None:
    script = """
import os, signal
from vitray.cli.interrupts import end_at_once_when_interrupted, install_handlers, on_interrupt
install_handlers()
end_at_once_when_interrupted("nothing was kept.")
with on_interrupt(lambda code: print("outer", code, flush=True)):
    with on_interrupt(lambda code: print("inner", code, flush=True)):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (143, "outer 143\n")


def test_temporary_folders_go_also_where_the_process_ends_at_once(tmp_path: Path) -> None:
    """As while Ray is loaded, where no exception may be raised."""
    folder = tmp_path / "copies"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(b"images")
    script = f"""
import os, signal, sys
from vitray.cli.interrupts import install_handlers, remove_when_interrupted
sys.modules["ray"] = sys
install_handlers()
remove_when_interrupted({str(folder)!r})
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 143 and done.stderr.strip() == (
        "interrupted; run the same command again."
    )
    assert not folder.exists()
