"""A dataset of drawn shapes, keys to remove from it, and what must be left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import vitray
from factories.shards import Picture, pictures, put_tars
from support.runs import command
from support.zygote import Zygote
from vitray.dataset import read_footer

IMAGES, SHARDS = 48, 3
BROKEN = (3, 20)  # one of them is removed
MORE = ("--set", "fragment_rows=8", "--set", "max_error_rate=0.5")
CHOSEN = (0, 3, 17, 30, 31)


def items() -> list[Picture]:
    """Drawn shapes, of which two are no images."""
    return [
        Picture(p.key, b"no image" if n in BROKEN else p.data, p.truth, p.suffix)
        for n, p in enumerate(pictures(IMAGES))
    ]


@pytest.fixture(scope="module")
def first(commands: Zygote, shapes_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs in `in`, a whole dataset in `out`, and the file `keys` with those of CHOSEN."""
    folder = tmp_path_factory.mktemp("removed")
    put_tars(str(folder / "in"), items(), SHARDS, folder)
    assert commands.run(argv_of(folder, shapes_model)) == 0
    keys = all_keys(str(folder / "out"))
    (folder / "keys").write_text("".join(f"{keys[n]}\n" for n in CHOSEN))
    return folder


def argv_of(folder: Path, model: str) -> list[str]:
    return [*command(folder, model, folder / "out")[3:], *MORE]


def all_keys(out: str) -> list[str]:
    """The keys of good rows and error rows, in the order of shard and index."""
    keys = list[tuple[str, int, str]]()
    for file in sorted(Path(out, "data").glob("*.parquet")):
        errors = read_footer(str(file)).error_rows
        table = pq.read_table(file, columns=["shard", "index", "key"])
        for rows in (table, errors):
            keys += zip(*(rows[name].to_pylist() for name in ("shard", "index", "key")))
    return [key for _, _, key in sorted(keys)]


def removal_of(folder: Path) -> list[str]:
    return ["remove", str(folder / "out"), "--keys", str(folder / "keys"), "--yes"]


def require_removed(folder: Path, expected: list[str]) -> None:
    out = str(folder / "out")
    assert all_keys(out) == expected
    assert vitray.read(out)["key"].to_pylist() == [
        key for key in expected if key not in error_keys(out)
    ]
    checked = vitray.validate(out, content=True)
    assert checked.ok, str(checked)
    assert checked.rows + checked.errors == IMAGES - len(CHOSEN)
    assert checked.left_out == {"removed": len(CHOSEN)}


def error_keys(out: str) -> set[str]:
    files = Path(out, "data").glob("*.parquet")
    return {key for file in files for key in read_footer(str(file)).error_rows["key"].to_pylist()}


def copy_of(first: Path, folder: Path) -> tuple[Path, list[str]]:
    """The dataset in another folder, and the keys that stay after the removal."""
    shutil.copytree(first / "out", folder / "out")
    shutil.copytree(first / "in", folder / "in")
    shutil.copy(first / "keys", folder / "keys")
    removed = (folder / "keys").read_text().split()
    return folder, [key for key in all_keys(str(folder / "out")) if key not in removed]
