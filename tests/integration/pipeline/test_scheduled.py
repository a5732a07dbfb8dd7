"""A source that grows and changes under a job that is run again and again: what is new is done, and
told; nothing else is touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import vitray
from factories.shards import Picture, pictures, tar_bytes
from support.scheduled_runs import put
from support.schemas import checked
from support.zygote import Zygote

VITRAY = [sys.executable, "-m", "vitray"]
RUN = [*VITRAY, "run", "--set", "format=tar", "--set", "engine=torch"]
EACH = 20


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[Picture], bytes]]:
    """Eight shards of images with keys of their own: what is in each, and its tar."""
    items = pictures(8 * EACH)
    scratch = tmp_path_factory.mktemp("tars")
    return [
        (part, tar_bytes(part, scratch))
        for part in (items[at : at + EACH] for at in range(0, len(items), EACH))
    ]


def run(
    commands: Zygote, folder: Path, model: str, out: Path, *more: str
) -> tuple[int, dict[str, object]]:
    argv, said = (
        [*RUN, str(folder / "in"), "--model", model, "--out", str(out), *more, "--json"],
        folder / "said",
    )
    code = commands.run(argv[len(VITRAY) :], stdout=str(said))
    text = said.read_text()
    return code, checked(text) if text else {}


def keys(out: Path) -> list[str]:
    return sorted(vitray.read(str(out), columns=["key"])["key"].to_pylist())


def of(*parts: tuple[list[Picture], bytes]) -> list[str]:
    return sorted(picture.key for part, _ in parts for picture in part)


def test_since_sample_and_limit_choose_whole_shards_and_say_what_they_left_out(
    commands: Zygote, shards: list[tuple[list[Picture], bytes]], shapes_model: str, tmp_path: Path
) -> None:
    for age, name, part in zip((9, 5, 0.5, 0), "abcd", shards):
        put(tmp_path / "in", name, part[1], days_ago=age)
    code, found = run(commands, tmp_path, shapes_model, tmp_path / "out", "--set", "since=3d")
    assert (code, found["committed"], found["shards_not_selected"], keys(tmp_path / "out")) == (
        0,
        2,
        2,
        of(*shards[2:4]),
    )
    code, found = run(commands, tmp_path, shapes_model, tmp_path / "out", "--set", "since=3d")
    assert (code, found["committed"], found["images"]) == (0, 0, 0)
    code, found = run(
        commands, tmp_path, shapes_model, tmp_path / "out", "--set", "since=7d", "--set", "limit=1"
    )
    assert (code, found["committed"], found["shards_not_selected"], keys(tmp_path / "out")) == (
        0,
        1,
        3,
        of(*shards[1:4]),
    )
    code, found = run(
        commands, tmp_path, shapes_model, tmp_path / "out"
    )  # none of them is part of the dataset's identity
    assert (code, found["committed"], found["shards_not_selected"], keys(tmp_path / "out")) == (
        0,
        1,
        0,
        of(*shards[:4]),
    )
