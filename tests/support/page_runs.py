"""Run the commands and the Python of a page, as its reader would."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from factories.shards import pictures
from support.docpages import MODEL, TUTORIAL, blocks, commands
from vitray.operations import demo


@dataclass(frozen=True)
class Ended:
    """A command of a page that was run."""

    command: str
    code: int
    output: str


def run_command(line: str, folder: Path) -> Ended:
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return Ended(line, done.returncode, done.stdout + done.stderr)


def run_python(text: str, folder: Path, name: str) -> dict[str, Any]:
    """The variables that a page's Python leaves, with all of its blocks in one module."""
    names: dict[str, Any] = {}
    with chdir(folder):
        for block in blocks(text, "python"):
            exec(compile(block, name, "exec"), names)
    return names


def missing_lines(shown: str, output: str, numbers: re.Pattern[str]) -> list[str]:
    """Lines of a page's `text` block that the command did not print, numbers left aside."""
    printed = {numbers.sub("#", line) for line in output.splitlines()}
    return [line for line in shown.splitlines() if numbers.sub("#", line) not in printed]


@pytest.fixture(scope="module")
def demo_folder(shapes_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make demo` has made the model and the shards."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(shapes_model, folder / "demo" / "model")
    with chdir(folder):
        demo.build("demo")
    return folder


@pytest.fixture(scope="module")
def tutorial(
    shapes_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Ended]]:
    """The folder in which the tutorial's commands ran, on 40 drawn images and a file that is not one.

    One change: the model is the tiny one of the tests, and its engine is torch. So nothing is
    fetched and no engine timed.
    """
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "photos").mkdir()
    for picture in pictures(40):
        (folder / "photos" / f"{picture.key}.jpg").write_bytes(picture.data)
    (folder / "photos" / "notes.jpg").write_bytes(b"no picture at all")
    lines = commands(TUTORIAL.read_text(encoding="utf-8"))
    tiny = f"{shapes_model} --set engine=torch"
    return folder, [run_command(line.replace(MODEL, tiny), folder) for line in lines]
