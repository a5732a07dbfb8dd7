"""Which argument is a job file, how JSON is read, and what is said when the shell expanded a
pattern of files.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.photo_folders import Call
from vitray.cli import main


@pytest.fixture
def vitray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """vitray(*argv) -> (exit code, stdout, stderr), in this process."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return (stopped.value.code, *capsys.readouterr())

    return call


def expanded(pattern: str) -> list[str]:
    """What a shell makes of a word without quotes."""
    done = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("run", ["--model", "m", "--out", "out"]),
        ("plan", ["--model", "m", "--out", "out"]),
        ("bench", ["--model", "m"]),
        ("submit", ["--address", "http://127.0.0.1:1", "--model", "m"]),
    ],
)
def test_a_pattern_without_quotes_is_explained(
    vitray: Call, photos: Path, command: str, rest: list[str]
) -> None:
    code, out, err = vitray(command, *expanded("photos/*.jpg"), *rest)
    assert (code, out) == (2, "")
    assert err == (
        "vitray: 3 files where one source is expected: the shell expanded the pattern; "
        f"quote it: vitray {command} 'photos/*.jpg' (vitray --help)\n"
    )
    assert not (photos / "out").exists()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("photos/*", 7),
        ("photos/*/*.png", 3),
        ("photos/2026/*", 2),
        ("photos/2026/*.png", 2),
        ("$PWD/photos/*.jpg", 3),
        ("./photos/*.jpg", 3),
    ],
)
def test_the_pattern_that_is_proposed_names_the_same_files(
    vitray: Call, photos: Path, pattern: str, count: int
) -> None:
    files = expanded(pattern)
    code, _, err = vitray("run", *files)
    assert code == 2
    assert err.startswith(
        f"vitray: {count} files where one source is expected: the shell expanded the pattern; "
        f"quote it: "
    )
    command = err.partition("quote it: ")[2].removesuffix(" (vitray --help)\n")
    proposed = shlex.split(command)[2]
    assert shlex.split(command) == ["vitray", "run", proposed] and f"'{proposed}'" in command
    assert expanded(proposed) == files


def test_files_that_no_simple_pattern_names_are_to_be_listed(vitray: Call, photos: Path) -> None:
    code, _, err = vitray("run", *expanded("photos/[ab].jpg"))
    assert (code, err) == (
        2,
        "vitray: 2 files where one source is expected: if the shell expanded the pattern, quote "
        "it: "
        "vitray run 'photos/*.jpg'; or list them as `source` of a job file (vitray --help)\n",
    )


def test_files_of_one_beginning_are_not_widened_to_the_whole_folder(
    vitray: Call, photos: Path
) -> None:
    for name in ("img_1.jpg", "img_2.jpg"):
        (photos / "photos" / name).write_bytes(b"x")
    assert (
        "quote it: vitray run 'photos/img_*.jpg' ("
        in vitray("run", *expanded("photos/img_?.jpg"))[2]
    )


def test_a_pattern_of_calibration_images_is_explained(vitray: Call, photos: Path) -> None:
    argv = [
        "export",
        "model",
        "--to",
        "onnx",
        "--into",
        "new",
        "--calibrate",
        *expanded("photos/*.jpg"),
    ]
    code, _, err = vitray(*argv)
    assert code == 2
    assert (
        "the shell expanded the pattern; quote it: vitray export-model --calibrate 'photos/*.jpg' "
        "(vitray --help)" in err
    )


def test_a_wrong_option_beside_a_pattern_is_named(vitray: Call, photos: Path) -> None:
    code, _, err = vitray("run", *expanded("photos/*.jpg"), "--modle", "m")
    assert code == 2 and "No such option: --modle" in err
