"""vitray compact: the same rows in few files, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import vitray
from factories import hand_made
from support.compacting import EACH_ALONE, IN_ONE, rows_of
from support.s3 import new_bucket
from vitray.operations.compacting import compact
from vitray.storage import join, store_for


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "local":
        return str(tmp_path)
    return new_bucket(request.getfixturevalue("mock_s3"), monkeypatch)


@pytest.mark.parametrize(("megabytes", "parts"), [(IN_ONE, 1), (EACH_ALONE, 3)])
def test_the_rows_are_those_of_the_dataset(
    place: str, tmp_path: Path, megabytes: int, parts: int
) -> None:
    dataset = hand_made.make_dataset(tmp_path, out=join(place, "out"))
    into = join(place, "into")
    found = compact(dataset.out, into, megabytes)
    assert (found.files, found.parts, found.written, found.rows) == (3, parts, parts, 27)
    assert rows_of(into).equals(vitray.read(dataset.out))
    again = compact(dataset.out, into, megabytes)
    assert (again.written, again.rows) == (0, 27)
    assert (
        json.loads(store_for(into).open(join(into, "_COMPACT.json")).read())["source"]
        == dataset.out
    )


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "compact",
        dataset.out,
        "--into",
        str(tmp_path / "into"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == f"{tmp_path}/into: 3 data files in 1 part, 1 of them written now, 27 rows\n"
    )
