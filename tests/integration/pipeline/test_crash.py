"""kill -9 at every named point of a run: the next run completes the dataset, and it equals that of
a run which nobody killed.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

import vitray
from factories.shards import pictures, put_tars
from support.crashes import rows_of
from support.runs import command
from support.zygote import Zygote
from vitray.crash import POINTS
from vitray.storage import join

IMAGES, SHARDS = 120, 3
FRAGMENTS = ("--set", "fragment_rows=16", "--set", "max_error_rate=0.5")
ON_S3 = ("commit-created",)  # the others nightly


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of drawn shapes, a few of them cut short."""
    folder = tmp_path_factory.mktemp("crash")
    items = [
        replace(p, data=p.data[: len(p.data) // 2]) if n % 25 == 3 else p
        for n, p in enumerate(pictures(IMAGES))
    ]
    put_tars(str(folder / "in"), items, SHARDS, folder)
    return folder


@pytest.fixture(scope="module")
def unharmed(inputs: Path, shapes_model: str) -> pa.Table:
    argv = [*command(inputs, shapes_model, inputs / "clean"), *FRAGMENTS]
    subprocess.run(argv, check=True, capture_output=True, timeout=120)
    return rows_of(str(inputs / "clean"))


def crash_and_go_on(
    commands: Zygote, point: str, argv: list[str], out: str, unharmed: pa.Table
) -> None:
    argv = argv[3:]  # without `python -m vitray`
    assert commands.run(argv, VITRAY_CRASH_AT=point) == -9, f"{point} was not reached"
    assert commands.run(argv) == 0
    assert rows_of(out).equals(unharmed)
    checked = vitray.validate(out, content=True)
    assert checked.ok, str(checked)
    assert checked.rows + checked.errors == IMAGES and checked.errors > 0


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_on_a_local_disk(
    commands: Zygote,
    point: str,
    inputs: Path,
    shapes_model: str,
    tmp_path: Path,
    unharmed: pa.Table,
) -> None:
    argv = [*command(inputs, shapes_model, tmp_path / "out"), *FRAGMENTS]
    crash_and_go_on(commands, point, argv, str(tmp_path / "out"), unharmed)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(p, marks=[] if p in ON_S3 else [pytest.mark.nightly])
        for p in POINTS
        if p != "object-written"
    ],
)
def test_a_crash_on_s3(
    commands: Zygote,
    point: str,
    inputs: Path,
    shapes_model: str,
    tmp_path: Path,
    s3: str,
    unharmed: pa.Table,
) -> None:
    out = join(s3, "out")
    argv = [*command(inputs, shapes_model, Path("out")), *FRAGMENTS]
    argv[argv.index("out")] = out
    crash_and_go_on(commands, point, argv, out, unharmed)
