"""Tars, folders and tables as users had them, and a run over them without a trained model."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import vitray
from support.paths import TESTS
from vitray.cli import main
from vitray.job import Job
from vitray.operations.planning import status
from vitray.operations.validation import validate
from vitray.pipeline import Result

MODEL = str(TESTS / "data" / "dataset-v1" / "model")


def jpg(seed: int, form: str = "JPEG", **options: object) -> bytes:
    """A picture of its own for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((40, 30)).save(buffer, form, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_files(folder: Path, names: dict[str, bytes]) -> Path:
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def job_for(source: object, out: Path, **fields: object) -> Job:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 8,
        "fragment_rows": 64,
        "compile": "off",
        "max_error_rate": 1,
    }
    return Job(**{"source": [str(source)], "model": MODEL, "out": str(out), **base, **fields})


class Labelled:
    """A run's result with its rows and its error rows, each in the order of shards and rows."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.rows = rows_below(Path(result.out, "data"))
        self.errors = rows_below(Path(result.errors_path))

    @property
    def keys(self) -> list[str]:
        return [row["key"] for row in self.rows]

    @property
    def names(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self.keys]

    @property
    def reasons(self) -> dict[str, str]:
        return {row["key"].rpartition("/")[2]: row["reason"] for row in self.errors}


def rows_below(folder: Path) -> list[dict[str, object]]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def label(source: object, out: Path, **fields: object) -> Labelled:
    """A run of this source; the dataset that it leaves is valid and says the same as the run."""
    result = vitray.run(job_for(source, out, **fields))
    checked = validate(result.out, content=True)
    assert checked.ok, checked
    assert checked.left_out == result.left_out == status(result.out).left_out
    return Labelled(result)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """cli(*argv) -> (exit code, stdout, stderr), in this process."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    yield call


def fields_of(**fields: object) -> list[str]:
    base = {
        "engine": "torch",
        "precision": "fp32",
        "batch_size": 8,
        "fragment_rows": 64,
        "max_error_rate": 1,
        **fields,
    }
    return [part for name, value in base.items() for part in ("--set", f"{name}={value}")]


DOTTED = ["Mr. Bean_0.jpg", "Mr. Bean_1.jpg", "Mr. T_0.jpg", "Robert Downey Jr._0.jpg"]
