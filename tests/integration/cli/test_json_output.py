"""With `--log-format json` each line that a process writes to stderr is one JSON object."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from support.command_line import waiting
from support.schemas import checked


def test_an_interrupt_is_one_object() -> None:
    argv = ["status", "s3://photos/out", "--log-format", "json"]
    with waiting(*argv) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    line = checked(err)
    assert (process.returncode, out) == (130, "")
    assert (line["error"], line["exit_code"]) == ("Interrupted", 130)
    assert line["message"].startswith("interrupted; ")


def test_a_run_that_fails_on_a_terminal_prints_json_and_no_view(tmp_path: Path) -> None:
    err = on_terminal("run", tmp_path / "none", "--model", "m", "--out", tmp_path / "out")
    assert "\x1b" not in err
    lines = [checked(line) for line in err.splitlines()]
    assert lines[0]["phase"] == "starting" and lines[-1]["error"] == "SourceError"


def on_terminal(*argv: object) -> str:
    """What the command writes to a terminal as its stderr, with JSON."""
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "vitray", *map(str, argv), "--log-format", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        text = b""
        while True:
            try:
                text += os.read(master, 65536)
            except OSError:  # the other side was closed
                break
        assert process.wait(60) == 2
    os.close(master)
    return text.decode()


LIBRARY = """
import logging, threading, warnings
from vitray import cli

def command(*args, **kwargs):
    logger = logging.getLogger("torch.onnx")
    logger.addHandler(logging.StreamHandler())  # as torch does
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.warning("torchvision is not installed")
    logging.getLogger("botocore").warning("library")
    warnings.warn("deprecated")
    logging.getLogger("vitray.x").warning("of vitray")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

from vitray.operations import planning
planning.status = command
cli.entry()
"""


def with_library(*argv: str) -> str:
    command = [sys.executable, "-c", LIBRARY, "status", "out", "--json", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr


def test_warnings_of_libraries_do_not_reach_the_terminal() -> None:
    err = with_library()
    assert "WARNING vitray.x: of vitray" in err
    assert not any(text in err for text in ("torchvision", "library", "deprecated"))


def test_with_debug_warnings_of_libraries_are_log_messages() -> None:
    err = with_library("--debug")
    assert "torchvision is not installed" in err and "WARNING botocore: library" in err
    assert "WARNING py.warnings: " in err and "deprecated" in err


def test_each_line_is_json_also_of_an_exception_that_nothing_caught() -> None:
    lines = [checked(line) for line in with_library("--log-format", "json").splitlines()]
    messages = {line["message"]: line for line in lines}
    assert messages["of vitray"]["level"] == "WARNING"
    failed = messages["an exception that nothing caught: ZeroDivisionError"]
    assert "in <lambda>" in failed["traceback"]
