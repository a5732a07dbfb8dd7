"""A source that grows and changes under a job that is run again and again: what is new is done, and
told; nothing else is touched."""

from __future__ import annotations

import shutil
import subprocess
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


def test_two_days_of_a_nightly_job(
    commands: Zygote, shards: list[tuple[list[Picture], bytes]], shapes_model: str, tmp_path: Path
) -> None:
    a, b, c, d, e, f, g, _ = shards
    folder, out = tmp_path / "in", tmp_path / "out"
    for name, part in zip("abcd", (a, b, c, d)):
        put(folder, name, part[1])
    code, first = run(commands, tmp_path, shapes_model, out)
    assert (code, first["committed"], keys(out)) == (0, 4, of(a, b, c, d))
    shutil.copytree(out, tmp_path / "yesterday")

    put(folder, "e", e[1])
    put(folder, "f", f[1])
    put(folder, "b", g[1])  # changed: all its images are others now
    (folder / "d.tar").unlink()
    put(folder, "x", b"no tar at all" * 500)
    put(folder, "y", a[1][: len(a[1]) // 2])  # cut: its beginning is good
    argv = [*RUN, str(folder), "--model", shapes_model, "--out", str(out)]
    twice = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # cron, twice
    codes = {process.wait(240) for process in twice}
    assert codes == {3}, [process.communicate() for process in twice]

    code, again = run(commands, tmp_path, shapes_model, out)
    cut = [
        key for key in keys(out) if keys(out).count(key) > 1
    ]  # the half of a, once more under the name y
    assert (code, again["committed"], again["gone"], len(again["truncated"])) == (3, 0, 1, 1)
    assert [name.split("-")[0] for name in again["set_aside"]] == ["x"]
    assert sorted(set(keys(out))) == of(a, c, d, e, f, g)
    assert 0 < len(cut) // 2 < EACH and set(cut) <= set(of(a))

    argv = [
        *VITRAY,
        "compare",
        str(tmp_path / "yesterday"),
        str(out),
        "--min-agreement",
        "0.98",
        "--json",
    ]
    told = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    found = checked(told.stdout)
    assert (told.returncode, found["rows"], found["agreement"]) == (0, 3 * EACH, 1.0)  # a, c, d
    assert (found["only_old_shards"], found["only_new_shards"]) == (
        1,
        4,
    )  # b as it was; b as it is, e, f, y

    (folder / "x.tar").unlink()
    (folder / "y.tar").unlink()
    code, last = run(commands, tmp_path, shapes_model, out, "--prune", "--yes")
    assert (code, last["gone"], keys(out)) == (0, 0, of(a, c, e, f, g))
    assert vitray.validate(str(out)).ok
