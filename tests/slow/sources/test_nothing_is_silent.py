"""An image that was in the source and has no row is counted, over random sources with odd names.

What a source holds is counted here with os.walk, tarfile, csv and pyarrow, and by magic bytes: not
by vitray.
"""

from __future__ import annotations

import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vitray
from support.user_inputs import job_for, jpg, rows_below
from vitray.errors import SourceError
from vitray.operations.planning import status
from vitray.operations.validation import validate
from vitray.pipeline import Result

SEEDS = range(5)
EACH = {
    "folders": 16,
    "tars": 12,
    "tables": 12,
}  # random sources of each kind for a seed: 200 in all
STEMS = (
    "a",
    "Mr. Bean_0",
    "Robert Downey Jr._0",
    "v1.2.final",
    "IMG 0001",
    "naïve ☃",
    "[x]",
    "a.b.c",
    "100%",
    "-dash",
    "a'b\"c",
    "{1,2}",
)
IMAGE_SUFFIXES = (".jpg", ".JPG", ".jpeg", ".jfif", ".png", ".Jpe", ".tif")
OTHER_SUFFIXES = (".txt", ".json", ".bak", ".jpg~", ".", "", ".csv", ".html", ".mp4")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"II*\0", b"MM\0*")
PICTURES = [jpg(1), jpg(2), jpg(3, "PNG")]


def is_picture(data: bytes) -> bool:
    return data.startswith(MAGIC)


def checked(result: Result) -> None:
    """The dataset is valid, and says the same as the run that made it."""
    validation = validate(result.out)
    assert validation.ok, validation
    assert validation.left_out == result.left_out == status(result.out).left_out
    assert validation.images == validation.rows + validation.errors


def random_name(rng: np.random.Generator) -> str:
    stem = str(rng.choice(STEMS)) + str(rng.integers(0, 30))
    suffix = str(rng.choice(IMAGE_SUFFIXES if rng.random() < 0.7 else OTHER_SUFFIXES))
    return str(rng.choice(["", "", "", "", ".", "_", ".tmp-"])) + stem + suffix


def random_data(rng: np.random.Generator) -> bytes:
    return (
        PICTURES[int(rng.integers(0, 3))]
        if rng.random() < 0.8
        else bytes(rng.bytes(int(rng.integers(0, 40))))
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_every_file_of_a_folder_is_a_row_an_error_or_counted(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng([1, seed])
    for number in range(EACH["folders"]):
        folder = tmp_path / f"in{number}"
        for _ in range(int(rng.integers(1, 25))):
            parts = [
                str(rng.choice(["sub", "_edited", ".git", "label=cat", "b [1]", "@eaDir"]))
                for _ in range(int(rng.integers(0, 3)))
            ]
            path = folder.joinpath(*parts, random_name(rng))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random_data(rng))
        (folder / "sure.jpg").write_bytes(PICTURES[0])
        if rng.random() < 0.3:
            (folder / "linked").symlink_to(tmp_path)
        form = {"format": "files"} if rng.random() < 0.5 or any(folder.rglob("*.csv")) else {}
        result = vitray.run(
            job_for(folder, tmp_path / f"out{number}", group_size=int(rng.integers(1, 30)), **form)
        )
        files = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in names]
        links = [
            name
            for base, folders, _ in os.walk(folder)
            for name in folders
            if os.path.islink(os.path.join(base, name))
        ]
        assert result.rows + result.errors + sum(result.left_out.values()) == len(files) + len(
            links
        ), sorted(files)
        checked(result)
        with_row = {
            row["uri"]
            for place in ("data", "_errors")
            for row in rows_below(Path(result.out, place))
        }
        without = [os.path.relpath(path, folder) for path in files if path not in with_row]
        hidden = [path for path in without if any(part[0] in "._@" for part in path.split("/"))]
        assert result.left_out.get("hidden", 0) == len(hidden)
        visible = set(without) - set(hidden)
        assert not any(path.lower().endswith(IMAGE_SUFFIXES) for path in visible)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_picture_of_a_tar_is_a_row_an_error_or_counted(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng([2, seed])
    refused = 0
    for number in range(EACH["tars"]):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        for shard in range(int(rng.integers(1, 4))):
            write_random_tar(folder / f"s{shard}.tar", rng)
        try:
            result = vitray.run(job_for(folder, tmp_path / f"out{number}", keep="json"))
        except SourceError as error:
            assert "several images" in str(error) and "image_member" in str(error)
            refused += 1
            continue
        aside = {shard.rsplit("-", 2)[0] for shard in result.set_aside}
        assert all("image_member" in why for why in result.set_aside.values())
        read = [path for path in folder.iterdir() if path.stem not in aside]
        pictures = sum(is_picture(data) for path in read for data in members(path))
        without_image = sum(
            row["reason"] == "missing" for row in rows_below(Path(result.errors_path))
        )
        assert (
            result.rows + result.errors - without_image + sum(result.left_out.values()) == pictures
        )
        checked(result)
        for row in rows_below(Path(result.out, "data")):
            assert row["json"] in (None, str(row["key"]).removesuffix(".depth")), (
                "a sidecar of another image"
            )
    assert refused < EACH["tars"]


def write_random_tar(path: Path, rng: np.random.Generator) -> None:
    """Samples with sidecars, several images and dotted names; images hidden or without a suffix."""
    style = str(rng.choice(["plain", "dotted", "depth", "mixed"]))
    names = list[tuple[str, bytes]]()
    for n in range(int(rng.integers(1, 20))):
        stem = f"{n:03d}" if style in ("plain", "depth") else f"{rng.choice(STEMS)}_{n:03d}"
        names.append((f"{stem}{rng.choice(IMAGE_SUFFIXES[:4])}", PICTURES[0]))
        if style in ("depth", "mixed") and rng.random() < 0.7:
            names.append((f"{stem}.depth.png", PICTURES[2]))
        if rng.random() < 0.5:
            names.append((f"{stem}.json", stem.encode()))
        if rng.random() < 0.02:
            names.append((f"{stem}.png", PICTURES[2]))
        if rng.random() < 0.1:
            names.append((f"._{stem}.jpg" if rng.random() < 0.5 else f"bare{n}", PICTURES[1]))
    if rng.random() < 0.5:
        names.sort()
    with tarfile.open(path, "w") as archive:
        for name, data in names:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def members(path: Path) -> list[bytes]:
    with tarfile.open(path) as archive:
        return [
            stream.read()
            for member in archive
            if (stream := archive.extractfile(member)) is not None
        ]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_line_of_a_table_is_a_row_or_an_error(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng([3, seed])
    for number in range(EACH["tables"]):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        for name in STEMS:
            (folder / f"{name}.jpg").write_bytes(PICTURES[0])
        count = int(rng.integers(1, 40))
        paths = [
            f"{rng.choice(STEMS)}.jpg"
            if rng.random() < 0.8
            else str(rng.choice(["gone.jpg", "", "../x.jpg"]))
            for _ in range(count)
        ]
        images = [random_data(rng) if rng.random() < 0.9 else None for _ in range(count)]
        kind = str(rng.choice(["csv", "bytes", "paths", "structs", "lists"]))
        source = write_table(folder, kind, paths, images, rng)
        result = vitray.run(
            job_for(
                source,
                tmp_path / f"out{number}",
                group_size=int(rng.integers(1, 50)),
                image_column=None,
            )
        )
        assert result.rows + result.errors == lines_of(source)
        lists = pq.read_table(source)["images"].to_pylist() if kind == "lists" else []
        lists = [[image for image in value if image is not None] for value in lists]
        values, empty = sum(map(len, lists)), sum(not value for value in lists)
        assert result.rows + result.errors + sum(result.left_out.values()) == (
            values + empty if kind == "lists" else lines_of(source)
        )
        checked(result)


def write_table(
    folder: Path, kind: str, paths: list[str], images: list[bytes | None], rng: np.random.Generator
) -> Path:
    if kind == "csv":
        delimiter = str(rng.choice([",", ";", "\t"]))
        with open(folder / "list.csv", "w", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows(
                [["path", "text, or none"], *([path, "x;y,z"] for path in paths)]
            )
        return folder / "list.csv"
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "bytes": {"image": pa.array(images, pa.binary())},
        "paths": {"path": pa.array(paths).dictionary_encode()},
        "structs": {
            "image": pa.array(
                [{"bytes": data, "path": path} for data, path in zip(images, paths)], struct
            )
        },
        "lists": {
            "images": pa.array(
                [[data] * int(rng.integers(0, 4)) for data in images], pa.list_(pa.binary())
            )
        },
    }[kind]
    pq.write_table(pa.table(columns), folder / "t.parquet", row_group_size=int(rng.integers(1, 20)))
    return folder / "t.parquet"


def lines_of(source: Path) -> int:
    if source.suffix == ".parquet":
        return pq.ParquetFile(source).metadata.num_rows
    with open(source, newline="") as stream:
        return sum(1 for _ in stream) - 1
