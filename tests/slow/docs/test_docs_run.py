"""What the pages show happens: the README's and the tutorial's commands print it, and all Python runs."""

from __future__ import annotations

import csv
import json
import re
import shlex
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pgvector
import pytest

from factories import embedded
from support.docpages import MODEL, PAGES, RECIPES, ROOT, TUTORIAL, blocks, commands, place_of
from support.page_runs import Ended, missing_lines, run_python
from vitray import cli
from vitray.consume.exporting import ExportOptions, export
from vitray.operations import demo

NUMBER = re.compile(r"\d[\d.,]*")

OWN_TESTS = {"python.md", "use-the-vectors.md"}  # pages whose Python has a test of its own below


def test_the_python_page_runs_the_demo(demo_folder: Path) -> None:
    text = (ROOT / "docs/how-to/python.md").read_text(encoding="utf-8")
    result = run_python(text, demo_folder, "python.md")["result"]
    assert (result.rows, result.errors, result.exit_code) == (588, 12, 0)
    with chdir(demo_folder):
        assert demo.accuracy("demo/out") >= 0.97
        names: dict[str, Any] = {}
        exec(blocks(RECIPES.read_text(encoding="utf-8"), "python")[0], names)
    assert names["nearest"][0][0] == "000/00000"
    assert names["nearest"][0][2] == pytest.approx(1, abs=1e-5)


def test_the_tutorial_shows_what_its_commands_print(tutorial: tuple[Path, list[Ended]]) -> None:
    folder, ended = tutorial
    shown = blocks(TUTORIAL.read_text(encoding="utf-8"), "text")
    assert len(shown) == 3
    for text, done in zip(shown, ended):
        assert missing_lines(text.replace("/home/you", str(folder)), done.output, NUMBER) == [], (
            done
        )


@pytest.mark.parametrize(
    "page",
    [
        p
        for p in PAGES
        if blocks(p.read_text(encoding="utf-8"), "python") and p.name not in OWN_TESTS
    ],
    ids=place_of,
)
def test_the_python_of_a_page_runs_on_the_dataset_of_the_tutorial(
    page: Path,
    tutorial: tuple[Path, list[Ended]],
    shapes_model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = page.read_text(encoding="utf-8").replace(MODEL, shapes_model)
    names = run_python(text, tutorial[0], page.name)
    printed = capsys.readouterr().out
    if page == TUTORIAL:
        assert len(printed.splitlines()) == 4
        assert printed.splitlines()[-1].split()[1] == "not_an_image"
    elif page.name == "exactness.md":
        assert names["agree"] == 16
        assert names["cosines"].min() >= 0.999
    elif page.name == "scheduled.md":
        assert printed.split()[:3] == ["1", "40", "1"]
    elif page.name == "commit.md":
        assert "'rows': '40'" in printed
        assert "'errors': '1'" in printed
    else:
        pytest.fail(f"{place_of(page)}: add what its Python leaves to this test")


def test_the_recipes_for_vectors_run_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = [
        embedded.noise(50, 64, seed, [f"{seed:03d}/{n:05d}" for n in range(50)]) for seed in (0, 1)
    ]
    embedded.make(tmp_path / "demo", parts, keep=["cls"])
    text = RECIPES.read_text(encoding="utf-8")
    for line in commands(text):
        if "--image" in line:  # needs a model: tests of search
            continue
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0, line
    assert capsys.readouterr().out.count("  1.0000  000/00000  ") == 2
    names = run_python(text, tmp_path, RECIPES.name)
    vectors = np.concatenate([part.vectors for part in parts])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = np.argsort(-(unit @ unit[0]))[:5]
    expected = [f"{n // 50:03d}/{n % 50:05d}" for n in nearest]
    assert [row[0] for row in names["nearest"]] == expected
    assert names["alike"] == expected
    assert [row["key"] for row in names["near"]] == expected
    assert np.array_equal(names["vectors"], vectors)
    assert np.array_equal(names["query"], vectors[0])
    assert names["unsure"].rows()[0] == ("000/00000", "cat", 0.75)
    assert len(names["unsure"]) == 10
    assert set(names["centres"]) == {"cat", "dog", "emu"}
    cats = vectors[[n % 50 % 3 == 0 for n in range(100)]].mean(0)
    assert np.allclose(names["centres"]["cat"], cats, atol=1e-6)


def test_the_csv_is_what_the_table_for_pgvector_takes(tmp_path: Path) -> None:
    part = embedded.noise(len(embedded.HOSTILE), 64, keys=embedded.HOSTILE)
    dataset = embedded.make(tmp_path, [part], keep=["cls"])
    export(dataset.out, str(tmp_path / "csv"), ExportOptions("csv", vectors=True))
    with open(tmp_path / "csv/rows.csv", newline="") as file:
        header, *rows = csv.reader(file)
    (statement,) = blocks(RECIPES.read_text(encoding="utf-8"), "sql")
    table = re.search(r"create table images \((.*?)\n\);", statement, re.DOTALL)
    assert table is not None
    types = dict(column.split() for column in table[1].split(","))
    assert list(types) == header
    assert types["embedding"] == "vector(64)"
    for row, key, vector in zip(rows, embedded.HOSTILE, part.vectors):
        values = dict(zip(header, row))
        assert values["key"] == key
        assert np.array_equal(pgvector.Vector.from_text(values["embedding"]).to_numpy(), vector)
        assert all(
            isinstance(json.loads(values[name]), list)
            for name, kind in types.items()
            if kind == "json"
        )
        assert all(int(values[name]) >= 0 for name, kind in types.items() if kind == "int")
