"""The README's code runs, and so do the job files."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import embedded
import numpy as np
import pgvector
import pytest

from vitray import cli
from vitray.consume.exporting import Wanted, export
from vitray.job import Job, load_job
from vitray.operations import demo

HOME = Path(__file__).parent.parent
README = (HOME / "README.md").read_text()
RECIPES = README.partition("## Use the embeddings")[2].partition("\n## ")[0]


def python_in(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_job_files_are_valid_jobs() -> None:
    files = sorted((HOME / "jobs").glob("*.yaml"))
    assert [load_job(f).model for f in files] == ["demo/model", "facebook/dinov2-base", "google/vit-base-patch16-224"]


def test_the_table_of_fields_says_what_the_job_says() -> None:
    said = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", README, re.MULTILINE))
    assert said == {name: field.description for name, field in Job.model_fields.items()}


def test_every_test_that_the_readme_names_exists() -> None:
    table = README.partition("## What it promises")[2].partition("## Memory")[0]
    for line in table.splitlines():
        for file in re.findall(r"`(test_\w+\.py)", line):
            text = "".join((HOME / "tests" / name).read_text() for name in re.findall(r"test_\w+\.py", line))
            assert (HOME / "tests" / file).exists()
        for start, middle in re.findall(r"(?:::|`…)(test_)?(\w+)", line):
            assert re.search(rf"def test_\w*{middle}" if not start else rf"def test_{middle}", text), middle


def test_the_python_of_the_readme_runs(shapes_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_model, "demo/model")
    demo.build("demo")
    names: dict[str, object] = {}
    for block in [*python_in(README.replace(RECIPES, "")), python_in(RECIPES)[0]]:
        exec(compile(block, "README.md", "exec"), names)
    result, nearest = names["result"], names["nearest"]
    assert (result.rows, result.errors, result.exit_code) == (588, 12, 0)
    assert nearest[0][0] == "000/00000" and nearest[0][2] == pytest.approx(1, abs=1e-5)
    assert demo.accuracy("demo/out") >= 0.97


def test_the_configs_for_embeddings_run_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [embedded.noise(50, 64, seed, [f"{seed:03d}/{n:05d}" for n in range(50)]) for seed in (0, 1)]
    embedded.make(tmp_path / "demo", parts, keep=["cls"])
    for line in re.findall(r"^    (vitray .*)$", RECIPES, re.MULTILINE):
        if "--image" not in line:  # wants a model: tests/test_searching.py
            monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0, line
    assert capsys.readouterr().out.count("  1.0000  000/00000  ") == 2
    names: dict[str, Any] = {}
    for block in python_in(RECIPES):
        exec(compile(block, "README.md", "exec"), names)
    vectors = np.concatenate([part.vectors for part in parts])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [f"{n // 50:03d}/{n % 50:05d}" for n in np.argsort(-(unit @ unit[0]))[:5]]
    assert [row[0] for row in names["nearest"]] == names["alike"] == [row["key"] for row in names["near"]] == expected
    assert np.array_equal(names["vectors"], vectors) and np.array_equal(names["query"], vectors[0])
    assert names["unsure"].rows()[0] == ("000/00000", "cat", 0.75) and len(names["unsure"]) == 10
    cats = vectors[[n % 50 % 3 == 0 for n in range(100)]].mean(0)
    assert set(names["centres"]) == {"cat", "dog", "emu"} and np.allclose(names["centres"]["cat"], cats, atol=1e-6)


def test_the_csv_is_what_the_table_for_pgvector_takes(tmp_path: Path) -> None:
    part = embedded.noise(len(embedded.HOSTILE), 64, keys=embedded.HOSTILE)
    export(embedded.make(tmp_path, [part], keep=["cls"]).out, str(tmp_path / "csv"), Wanted("csv", vectors=True))
    with open(tmp_path / "csv/rows.csv", newline="") as file:
        header, *rows = csv.reader(file)
    columns = re.search(r"create table images \((.*?)\n\);", RECIPES, re.DOTALL)[1].split(",")
    kinds = dict(column.split() for column in columns)
    assert list(kinds) == header and kinds["embedding"] == "vector(64)"
    for row, key, vector in zip(rows, embedded.HOSTILE, part.vectors):
        said = dict(zip(header, row))
        assert said["key"] == key and np.array_equal(pgvector.Vector.from_text(said["embedding"]).to_numpy(), vector)
        assert all(isinstance(json.loads(said[name]), list) for name, kind in kinds.items() if kind == "json")
        assert all(int(said[name]) >= 0 for name, kind in kinds.items() if kind == "int")
