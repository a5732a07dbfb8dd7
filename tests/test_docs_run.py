"""What the pages show happens: the README's and the tutorial's commands print it, and all Python runs."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embedded
import numpy as np
import pgvector
import pytest
from browser import Browser
from docpages import MODEL, PAGES, README, RECIPES, ROOT, TUTORIAL, blocks, commands, place_of
from shards import pictures

import vitray
from vitray import cli
from vitray.consume.exporting import ExportOptions, export
from vitray.operations import demo

NUMBER = re.compile(r"\d[\d.,]*")
TIMES = re.compile(r"\d[\d.]*(?= s\b| images/s| pictures| MB)")
OWN_TESTS = {"python.md", "use-the-vectors.md"}  # pages whose Python has a test of its own below


@dataclass(frozen=True)
class Ended:
    """A command of a page that was run."""

    command: str
    code: int
    output: str


def run_command(line: str, folder: Path) -> Ended:
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return Ended(line, done.returncode, done.stdout + done.stderr)


def run_python(text: str, folder: Path, name: str) -> dict[str, Any]:
    """The variables that a page's Python leaves, with all of its blocks in one module."""
    names: dict[str, Any] = {}
    with chdir(folder):
        for block in blocks(text, "python"):
            exec(compile(block, name, "exec"), names)
    return names


def missing_lines(shown: str, output: str, numbers: re.Pattern[str]) -> list[str]:
    """Lines of a page's `text` block that the command did not print, numbers left aside."""
    printed = {numbers.sub("#", line) for line in output.splitlines()}
    return [line for line in shown.splitlines() if numbers.sub("#", line) not in printed]


# ---------------------------------------------------------------- README


@pytest.fixture(scope="module")
def demo_folder(shapes_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make demo` has made the model and the shards."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(shapes_model, folder / "demo" / "model")
    with chdir(folder):
        demo.build("demo")
    return folder


def test_the_readme_labels_a_folder_in_three_commands(demo_folder: Path) -> None:
    section = (
        README.read_text(encoding="utf-8").partition("## Label a folder")[2].partition("\n## ")[0]
    )
    (unpack,) = re.findall(r"^mkdir photos.*$", section, re.MULTILINE)
    subprocess.run(["bash", "-c", unpack], cwd=demo_folder, check=True, timeout=60)
    ended = []
    for line in commands(section):
        quick = line.replace("demo/model", "demo/model --set engine=torch")  # no engine is timed
        ended.append(run_command(quick, demo_folder))
    assert [done.code for done in ended] == [0, 0, 0], ended
    assert [done.command.split()[1] for done in ended] == ["run", "validate", "report"]
    (shown,) = blocks(section, "text")
    output = "".join(done.output for done in ended)
    assert missing_lines(shown.replace("/home/you", str(demo_folder)), output, TIMES) == []
    rows = run_python(section, demo_folder, "README.md")["rows"]
    assert len(rows) == 588
    (counted,) = re.findall(r"value_counts\(\)\)  # (.*)$", section, re.MULTILINE)
    named = set(re.findall(r"[a-z]+", counted))
    assert named <= set(rows["label"])


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


# ---------------------------------------------------------------- tutorial


@pytest.fixture(scope="module")
def tutorial(
    shapes_model: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Ended]]:
    """The folder in which the tutorial's commands ran, on 40 drawn images and a file that is not one.

    One change: the model is the tiny one of the tests, and its engine is torch. So nothing is
    fetched and no engine timed.
    """
    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "photos").mkdir()
    for picture in pictures(40):
        (folder / "photos" / f"{picture.key}.jpg").write_bytes(picture.data)
    (folder / "photos" / "notes.jpg").write_bytes(b"no picture at all")
    lines = commands(TUTORIAL.read_text(encoding="utf-8"))
    tiny = f"{shapes_model} --set engine=torch"
    return folder, [run_command(line.replace(MODEL, tiny), folder) for line in lines]


def test_the_tutorial_labels_a_folder(tutorial: tuple[Path, list[Ended]]) -> None:
    folder, ended = tutorial
    assert [done.code for done in ended] == [0] * 4, ended
    assert [done.command.split()[1] for done in ended] == ["run", "validate", "report", "search"]
    rows = vitray.read(f"{folder}/photos-vit", columns=["uri", "label"]).to_pylist()
    truth = {f"{folder}/photos/{picture.key}.jpg": picture.truth for picture in pictures(40)}
    assert [row["uri"] for row in rows] == sorted(truth)
    assert sum(truth[row["uri"]] == row["label"] for row in rows) >= 38
    page = (folder / "photos-vit-report.html").read_text()
    assert all(label in page for label in {row["label"] for row in rows})
    assert "not_an_image" in page
    nearest = "".join(ended[3].output.splitlines()[:2])
    assert "00000.jpg" in nearest


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


# ---------------------------------------------------------------- recipes for vectors


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


# ---------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("material", reason="the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_leaves_no_link_to_markdown(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        targets = re.findall(r'href="([^"#]*)', page.read_text(encoding="utf-8"))
        assert [target for target in targets if target.endswith(".md")] == []


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="?([^"\s>]+)', html)
        loaded += re.findall(
            r'<link rel="?(?:stylesheet|icon|preconnect|preload)"?[^>]* href="?([^"\s>]+)', html
        )
        assert loaded
        assert [url for url in loaded if "//" in url] == []


def test_the_search_of_the_site_works_from_a_disk(site: Path, tmp_path: Path) -> None:
    """Types a query into the search field of the built page, and waits for results."""
    query = """new Promise(async (resolve) => {
      const field = document.querySelector(".md-search__input");
      field.focus();
      field.value = "stall_timeout_s";
      field.dispatchEvent(new Event("input", { bubbles: true }));
      field.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }));
      for (let tries = 0; tries < 100; tries++) {
        await new Promise((next) => setTimeout(next, 100));
        const links = [...document.querySelectorAll(".md-search-result__link")];
        if (links.length) return resolve(links.map((link) => link.href.split("/").pop()));
      }
      resolve([]);
    })"""
    browser = Browser(tmp_path / "profile")
    try:
        visit = browser.visit(site / "index.html", 1200, (query,))
    finally:
        browser.close()
    assert any(link.startswith("reference.html") for link in visit.values[0]), visit.said
    assert [url for url in visit.requests if not url.startswith("file:")] == []
