"""The README is short, and its figures, extras and job files are right. test_docs.py checks its
links and commands.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from support.docpages import README, ROOT, TUTORIAL, blocks, place_of, sentences
from vitray.job import Job, load_job

TEXT = README.read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
PLAIN = [README, TUTORIAL, ROOT / "docs" / "README.md", *HOW_TO]
DEVELOPERS = {"dev", "bench", "fuzz", "audit", "docs"}  # extras that no user needs


def section(heading: str) -> str:
    """What stands below a heading of the README."""
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_readme_has_at_most_120_lines() -> None:
    assert len(TEXT.splitlines()) <= 120


@pytest.mark.parametrize("page", PLAIN, ids=place_of)
def test_no_sentence_has_more_than_30_words(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [sentence for sentence in sentences(text) if len(sentence.split()) > 30] == []


def test_nine_of_ten_sentences_of_the_readme_have_at_most_22_words() -> None:
    lengths = sorted(len(sentence.split()) for sentence in sentences(TEXT))
    assert lengths[int(0.9 * len(lengths))] <= 22


@pytest.mark.parametrize("page", PLAIN, ids=place_of)
def test_text_is_wrapped_at_100_columns(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_sentences_are_found_in_text_lists_and_tables_but_not_in_code() -> None:
    text = "# Head\n\nOne. Two\nlines.\n\n- Item `a. B`\n\n    code\n\n| cell one | cell two |\n"
    assert sentences(text) == ["One.", "Two lines.", "- Item CODE", "cell one", "cell two"]


def test_the_extras_of_the_readme_are_those_of_the_project() -> None:
    listed = section("Install").partition("Extras:")[2].partition(". Where a page")[0]
    extras = set(re.findall(r"`(\w+)`", listed))
    assert extras == PROJECT["optional-dependencies"].keys() - DEVELOPERS


def test_the_python_version_of_the_readme_is_that_of_the_project() -> None:
    assert PROJECT["requires-python"].removeprefix(">=") in section("Install")


def test_the_figures_of_the_comparison_stand_in_the_benchmarks() -> None:
    benchmarks = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    table = "".join(re.findall(r"^\|.*\n", section("How it compares"), re.MULTILINE))
    figures = re.findall(r"\d+\.\d+", table)
    assert len(figures) == 2
    assert all(figure in benchmarks for figure in figures)


def test_the_screenshot_is_small() -> None:
    assert 10_000 < (ROOT / "docs" / "images" / "report.png").stat().st_size < 300_000


def test_the_job_of_the_readme_is_valid() -> None:
    (job,) = blocks(TEXT, "yaml")
    assert Job(**yaml.safe_load(job)).out == "s3://photos-vit"


def test_the_job_files_are_valid_jobs() -> None:
    models = [load_job(file).model for file in sorted((ROOT / "jobs").glob("*.yaml"))]
    assert models == ["demo/model", "facebook/dinov2-base", "google/vit-base-patch16-224"]
