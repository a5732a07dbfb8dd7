"""`benchmarks/bench_free.py`: its arithmetic and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bench_free
from bench_free import Run


def runs(case: str, costs: list[tuple[float, float]]) -> list[Run]:
    """A pair for each round: seconds and CPU seconds of 1,000 images, beyond a start of 5 s."""
    return [
        Run(number, case, images, 5 + seconds * images / 1000, 7 + cpu_s * images / 1000)
        for number, (seconds, cpu_s) in enumerate(costs, 1)
        for images in (1000, 3000)
    ]


def test_a_slope_leaves_the_start_out() -> None:
    found = bench_free.slopes(runs("vitray:tars-100", [(2.0, 3.0), (4.0, 2.5)]), "vitray:tars-100")
    assert {n: each.images_per_s for n, each in found.items()} == pytest.approx({1: 500, 2: 250})
    assert {n: each.cpu_ms for n, each in found.items()} == pytest.approx({1: 3.0, 2: 2.5})


def test_a_round_without_its_larger_run_has_no_slope() -> None:
    made = runs("vitray:tars-100", [(2.0, 3.0), (4.0, 2.5)])[:-1]
    assert list(bench_free.slopes(made, "vitray:tars-100")) == [1]


def test_ratios_are_those_of_one_round_each() -> None:
    local = runs("vitray:tars-1000", [(1.0, 2.0), (2.0, 2.0), (1.0, 2.0)])
    ray = runs("vitray-ray:tars-1000", [(2.0, 3.0), (4.0, 2.5), (1.0, 4.0)])
    pair = ("vitray-ray:tars-1000", "vitray:tars-1000")
    assert bench_free.ratios([*local, *ray], *pair) == pytest.approx([0.5, 0.5, 1.0])
    assert bench_free.further_cpu([*local, *ray], *pair) == pytest.approx([1.0, 0.5, 2.0])
    lines = bench_free.markdown([*local, *ray]).splitlines()
    assert lines[2] == (
        "| vitray, local executor | tars-1000 | 1000 (500..1000) | 2.00 (2.00..2.00) | 3 |"
    )
    assert lines[-1] == (
        "| vitray on Ray, tars-1000 | vitray, local executor, tars-1000 | 0.50 (0.50..1.00) "
        "| 1.00 (0.50..2.00) |"
    )


def test_every_ratio_names_cases_that_exist() -> None:
    assert {case for pair in bench_free.RATIOS for case in pair} <= set(bench_free.CASES)
    programs = {case.split(":")[0] for case in bench_free.CASES}
    assert programs == bench_free.PROGRAMS.keys() == bench_free.TITLES.keys()


def test_a_program_that_is_not_installed_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left = bench_free.available(["loop:tars-100", "daft:files", "other:tars-100"], None)
    assert left == ["loop:tars-100"]
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "left out: daft",
        "left out: other",
    ]


def test_only_the_rows_of_images_are_counted(tmp_path: Path) -> None:
    for folder, rows in (("data", 3), ("more", 2), ("_errors", 4), ("_vitray", 5)):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"key": list(range(rows))}), tmp_path / folder / "a.parquet")
    assert bench_free.count_rows(tmp_path) == 5


def test_tars_and_files_hold_the_same_images(tmp_path: Path) -> None:
    jpegs = [tmp_path / f"{number}.jpg" for number in range(3)]
    for jpeg in jpegs:
        jpeg.write_bytes(jpeg.name.encode())
    folder = bench_free.make_inputs(tmp_path, jpegs, 150)
    files = [path.read_bytes() for path in sorted((folder / "files").iterdir())]
    assert files[:4] == [b"0.jpg", b"1.jpg", b"2.jpg", b"0.jpg"] and len(files) == 150
    for kind, tars in (("tars-100", 2), ("tars-1000", 1)):
        paths = sorted((folder / kind).iterdir())
        assert len(paths) == tars
        assert list(bench_free.image_bytes(paths)) == files
