"""Bad usage, help, versions, tracebacks, and text that must not reach the terminal raw."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import ESCAPE, Call, raw, refused
from vitray.version import __version__


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "Missing argument 'JOB.yaml|SOURCE'"),
        (["runn", "x"], "No such command 'runn'"),
        (["plan", "x", "--modle", "m"], "No such option: --modle"),
        (["plan", "a", "b"], "unexpected extra argument"),
        (["redo"], "Missing argument 'OUT'"),
        (["run", "--source", "x"], "No such option: --source"),
        (["status", "x", "--keep", "cls"], "No such option: --keep"),
        (["plan", "x", "--set"], "requires an argument"),
        ([f"ru{ESCAPE}n"], "No such command"),
        (["plan", "x", f"--{ESCAPE}"], "No such option"),
    ],
)
def test_bad_usage_exits_2(vitray: Call, tmp_path: Path, argv: list[object], says: str) -> None:
    refused(vitray, tmp_path, argv, 2, "vitray: ", says, "(vitray --help)")


@pytest.mark.parametrize("argv", [["--version"], ["--debug", "--version"], ["--version", "run"]])
def test_version_is_printed(vitray: Call, argv: list[str]) -> None:
    assert vitray(*argv) == (0, f"vitray {__version__}\n", "")


def test_no_command_shows_the_help_and_nothing_else(vitray: Call) -> None:
    code, out, err = vitray()
    assert (
        code == 2
        and "Label and embed image collections" in out + err
        and "(vitray --help)" not in err
    )


def test_a_hostile_file_name_does_not_reach_the_terminal_raw(vitray: Call, tmp_path: Path) -> None:
    folder = tmp_path / f"in{ESCAPE}"
    folder.mkdir()
    (folder / "a.text").write_bytes(b"x")
    err = refused(
        vitray, tmp_path, ["plan", folder, "--model", "m", "--out", "o"], 2, "holds no tar"
    )
    assert "owned" in err


def test_hostile_text_on_stdout_is_not_raw(vitray: Call, tmp_path: Path) -> None:
    """Names on the line, keys of a tar, and messages that a run record kept."""
    out = tmp_path / f"o{ESCAPE}ut"
    spec = hand_made.checkpoint_spec(tmp_path)
    dataset = hand_made.make_dataset(tmp_path, out=str(out), spec=spec)
    path = tmp_path / "in" / "s-000.tar"
    stat = path.stat()
    hand_made.write_tar(
        path, {f"{i}{ESCAPE}.jpg": f"image 0 {i}".encode() for i in range(hand_made.IMAGES)}
    )
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    code, text, err = vitray("validate", dataset.out, "--content")
    assert code == 1 and "is not what was labelled" in text and "owned" in text
    assert raw(text + err) == []
    runs = out / "_vitray" / "runs"
    runs.mkdir()
    record = {
        "finished": "now",
        "images": 1,
        "images_per_s": 1,
        "set_aside": {"s": f"cannot {ESCAPE} read"},
    }
    (runs / "20250101.json").write_text(json.dumps(record))
    (out / "_SUCCESS.json").unlink()
    code, text, err = vitray("status", dataset.out)
    assert code == 0 and "set aside  s: cannot ?]0;owned??[31m read" in text
    assert raw(text + err) == []
    argv = [f"{tmp_path}/in", "--model", f"{tmp_path}/model", "--out", out, *hand_made.SAME_JOB]
    code, text, err = vitray("plan", *argv)
    assert code == 0 and raw(text + err) == []
    code, text, err = vitray("status", dataset.out, "--json")
    assert raw(text + err) == [] and json.loads(text)["last_run"] == record
