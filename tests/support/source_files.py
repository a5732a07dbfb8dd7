"""Tars, tables and loose files of a source, and what is read of them."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from vitray.job import Job, make_job
from vitray.schema import Encoded, End, Shard
from vitray.sources import list_shards, read_shard

IMAGES = {f"img{n:02d}": b"\xff\xd8" + bytes([n]) * (300 + 211 * n) for n in range(7)}
Members = list[tuple[str, bytes]]


def job_for(*source: Path | str, **fields: object) -> Job:
    return make_job({"source": [str(s) for s in source], "model": "m", "out": "o", **fields})


def read_all(
    shard: Shard, job: Job, is_wanted: Callable[[int], bool] = lambda index: True
) -> tuple[list[Encoded], End]:
    *rows, end = read_shard(shard, job, is_wanted)
    assert isinstance(end, End) and all(isinstance(row, Encoded) for row in rows)
    return rows, end


def only_shard(job: Job) -> Shard:
    (shard,) = list_shards(job, []).shards
    return shard


def kept(row: Encoded) -> tuple[object, ...]:
    """The passthrough values of one image."""
    assert row.passthrough is not None
    return tuple(column[row.passthrough.row].as_py() for column in row.passthrough.batch.columns)


def pairs(rows: list[Encoded]) -> list[tuple[int, str, bytes | None]]:
    return [(row.index, row.key, row.data) for row in rows]


def expected(images: dict[str, bytes]) -> list[tuple[int, str, bytes]]:
    return [(n, key, data) for n, (key, data) in enumerate(images.items())]


def write_tar(path: Path, members: Members, form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def image_members() -> Members:
    return [(f"{key}.jpg", data) for key, data in IMAGES.items()]


def read_tar(path: Path, **fields: object) -> tuple[list[Encoded], End]:
    job = job_for(path, format="tar", **fields)
    return read_all(only_shard(job), job)


def put_raw(folder: Path, name: bytes, data: bytes) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def whole_tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tar(tmp_path_factory.mktemp("w") / "a.tar", image_members()).read_bytes()


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return path
