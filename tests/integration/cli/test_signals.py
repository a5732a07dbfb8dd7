"""A signal ends a command with its exit code and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from support.command_line import waiting, without_progress
from vitray.dataset import Dataset


def interrupted(running: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Its exit code and the only line that it says, within 10 s of a signal."""
    started = time.monotonic()
    running.send_signal(number)
    out, err = running.communicate(timeout=20)
    assert time.monotonic() - started < 10 and out == ""
    return running.returncode, without_progress(err).strip()


@pytest.mark.parametrize(
    ("command", "number", "says"),
    [
        ("plan", signal.SIGTERM, "run the same command again."),
        ("plan", signal.SIGINT, "run the same command again."),
        ("run", signal.SIGINT, "what is staged stays. Run the same command again to continue."),
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_a_next_step(
    tmp_path: Path, command: str, number: int, says: str
) -> None:
    with waiting(command, "s3://b/in", "--model", "m", "--out", tmp_path / "out") as running:
        assert interrupted(running, number) == (128 + number, f"interrupted; {says}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_interrupted_leaves_nothing(
    dataset: Dataset, tmp_path: Path, number: int
) -> None:
    path = Path(dataset.out, "_vitray", "dataset.json")
    path.write_text(path.read_text().replace(f"{tmp_path}/in/*.tar", "s3://b/in"))
    with waiting(
        "export", dataset.out, "--to", "webdataset", "--into", tmp_path / "made" / "tars"
    ) as running:
        assert list((tmp_path / "made").glob(".tmp-*"))
        assert interrupted(running, number) == (
            128 + number,
            "interrupted; run the same command again.",
        )
    assert list((tmp_path / "made").iterdir()) == []
