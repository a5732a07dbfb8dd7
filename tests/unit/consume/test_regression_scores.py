"""Validation, reports and comparisons of scores that are no probabilities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from factories import hand_made
from vitray.consume.comparing import compare
from vitray.consume.report import report
from vitray.operations.validation import validate


def dataset_scored(
    folder: Path, score: float, monkeypatch: pytest.MonkeyPatch, out: str = "out", **spec: object
) -> str:
    """The directory of a dataset in which every row has that score."""
    row = hand_made.row
    monkeypatch.setattr(
        hand_made,
        "row",
        lambda *place: {**row(*place), "score": score, "top_scores": [score, score - 1]},
    )
    base = hand_made.spec_of(str(folder / "model"))
    return hand_made.make_dataset(
        folder, spec=dataclasses.replace(base, **spec), out=str(folder / out)
    ).out


@pytest.mark.parametrize("score", [-3.5, 0.5, 42.0])
def test_validate_takes_any_finite_value_of_regression(
    tmp_path: Path, score: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = dataset_scored(tmp_path, score, monkeypatch, multi_label=True, regression=True)
    assert validate(out, inputs=False).problems == ()


@pytest.mark.parametrize("spec", [{}, {"multi_label": True}], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("score", [-3.5, 42.0])
def test_validate_names_scores_that_are_no_probability(
    tmp_path: Path, score: float, spec: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = validate(dataset_scored(tmp_path, score, monkeypatch, **spec), inputs=False).problems
    assert len(problems) == 3 and all(
        problem.endswith("a score is not within 0 and 1") for problem in problems
    )


@pytest.mark.parametrize(
    "spec", [{}, {"multi_label": True, "regression": True}], ids=["softmax", "regression"]
)
def test_validate_names_scores_that_are_not_finite(
    tmp_path: Path, spec: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = validate(
        dataset_scored(tmp_path, float("nan"), monkeypatch, **spec), inputs=False
    ).problems
    assert len(problems) == 3 and all("a score is not" in problem for problem in problems)


def test_a_report_of_regression_counts_every_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = dataset_scored(tmp_path, -3.5, monkeypatch, multi_label=True, regression=True)
    page = report(out, str(tmp_path / "page.html"), pictures=False)
    assert page.images == 30 and "<html" in Path(page.page).read_text()


def test_a_comparison_of_regression_gives_the_mean_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"multi_label": True, "regression": True}
    with monkeypatch.context() as patch:
        old = dataset_scored(tmp_path, -3.5, patch, out="old", **spec)
    new = dataset_scored(tmp_path, 40.0, monkeypatch, out="new", **spec)
    found = compare(old, new)
    assert (found.rows, found.agreement, found.score_shift) == (27, 1.0, pytest.approx(43.5))
