"""Scores equal those of transformers' pipeline, for every kind of head and engine."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from factories import hand_made
from factories.small_models import edit, job_for, make_checkpoint, noise, run
from support.model_heads import (
    CLASSES,
    IMAGES,
    ONE,
    ONE_OF_MANY,
    TAGS,
    VALUE,
    VALUES,
    require_pipeline,
)
from support.paths import TESTS
from vitray.errors import ModelError
from vitray.job import Job
from vitray.models import Predictions, engines, identify
from vitray.models.checkpoint import hash_weights, read_config
from vitray.models.checkpoint_store import locate
from vitray.models.linear_head import Head, write_head
from vitray.schema import ScoreFunction

HEADS = [
    pytest.param(ONE, ScoreFunction.SIGMOID, id="one"),
    pytest.param(ONE_OF_MANY, ScoreFunction.SIGMOID, id="one-multi-label"),
    pytest.param(VALUE, ScoreFunction.NONE, id="one-regression"),
    pytest.param(VALUES, ScoreFunction.NONE, id="three-regression"),
    pytest.param(CLASSES, ScoreFunction.SOFTMAX, id="three"),
    pytest.param(TAGS, ScoreFunction.SIGMOID, id="three-multi-label"),
]


@pytest.mark.parametrize(("head", "function"), HEADS)
def test_scores_are_those_of_the_transformers_pipeline(
    tmp_path: Path, head: dict[str, object], function: ScoreFunction
) -> None:
    model, pixels = make_checkpoint(tmp_path, "vit", True, **head), noise(IMAGES)
    spec = identify(job_for(model))
    assert spec.score_function is function
    require_pipeline(run(job_for(model), pixels, spec), spec, model, pixels)


@pytest.mark.parametrize("name", ["distilled", "clip", "siglip"])
@pytest.mark.parametrize("head", [ONE, VALUE], ids=["one", "regression"])
def test_one_output_is_no_softmax_in_other_families(
    tmp_path: Path, name: str, head: dict[str, object]
) -> None:
    model, pixels = make_checkpoint(tmp_path, name, True, **head), noise(IMAGES)
    spec = identify(job_for(model))
    require_pipeline(run(job_for(model), pixels, spec), spec, model, pixels)


def test_raw_values_are_ordered_from_the_highest_and_may_be_negative(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "vit", True, num_labels=3, problem_type="regression")
    scores = run(job_for(model, top_k=3), noise(IMAGES)).scores
    assert (np.diff(scores, axis=1) <= 0).all() and scores.min() < 0
    best_two = run(job_for(model, top_k=2), noise(IMAGES)).scores
    np.testing.assert_array_equal(best_two, scores[:, :2])


def test_a_head_of_its_own_gives_a_softmax_whatever_the_checkpoints_head_is(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", "vit", True, **VALUE)
    job = job_for(model, head=head_of(tmp_path / "head", model, ("cat", "dog")))
    spec = identify(job)
    assert (spec.labels, spec.score_function) == (("cat", "dog"), ScoreFunction.SOFTMAX)
    np.testing.assert_allclose(run(job, noise(IMAGES), spec).scores.sum(1), 1, rtol=1e-5)


def test_a_single_label_beside_nothing_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_checkpoint(tmp_path / "m", "vit", True)
    with caplog.at_level(logging.WARNING):
        identify(job_for(model, head=head_of(tmp_path / "two", model, ("cat", "dog"))))
        assert not caplog.records
        job = job_for(model, head=head_of(tmp_path / "one", model, ("cat",)))
        assert (run(job, noise(2)).scores == 1).all()
    assert "'cat' is the only label, so its score is 1.0 for every image" in caplog.text


def head_of(folder: Path, model: str, names: tuple[str, ...]) -> str:
    folder.mkdir()
    weight = np.random.default_rng(3).normal(size=(len(names), 32)).astype(np.float32)
    bias = np.zeros(len(names), np.float32)
    write_head(
        str(folder),
        Head(names, weight, bias, None, "cls", False, model, hash_weights(locate(model, None))),
    )
    return str(folder)


def test_scores_that_are_no_distribution_teach_no_student(tmp_path: Path) -> None:
    for n, (head, independent) in enumerate(
        [(ONE, True), (VALUES, True), (TAGS, True), (CLASSES, False)]
    ):
        config = read_config(locate(make_checkpoint(tmp_path / str(n), "vit", True, **head), None))
        assert config.multi_label is independent  # what vitray finetune asks of a teacher


@dataclasses.dataclass(frozen=True)
class Case:
    """Results of an engine against [[0.5, -1], [-2, -3]] of torch, and how they differ."""

    scores: list[list[float]]
    reason: str | None
    regression: bool = True
    ids: list[list[int]] = dataclasses.field(default_factory=lambda: [[0, 1], [1, 0]])


CASES = [
    Case([[0.5, -1], [-2, -3]], None),  # the same values, though negative
    Case([[0.5001, -1], [-2.001, -3]], None),
    Case([[0.5, -1], [-1.9, -3]], "a score 0.1 off that of torch in fp32"),
    Case(
        [[0.5, -1], [-3, -3]], "a score 1 off that of torch in fp32", ids=[[0, 1], [0, 1]]
    ),  # another label, its own score
]


@pytest.mark.parametrize("case", CASES)
def test_engines_of_regression_agree_by_value(case: Case) -> None:
    spec = dataclasses.replace(
        hand_made.spec_of("m"), labels=("a", "b"), multi_label=True, regression=case.regression
    )
    expected = Predictions(
        np.array([[0, 1], [1, 0]]), np.array([[0.5, -1], [-2, -3]], np.float32), {}
    )
    found = Predictions(np.array(case.ids), np.array(case.scores, np.float32), {})
    assert engines.describe_mismatch(found, expected, spec) == case.reason


@pytest.mark.parametrize(
    ("score", "reason"),
    [(0.2, None), (0.2009, None), (0.9, "a score 0.7 off that of torch in fp32")],
)
def test_engines_of_one_output_agree_by_value(score: float, reason: str | None) -> None:
    spec = dataclasses.replace(hand_made.spec_of("m"), labels=("a",), multi_label=True)
    expected = Predictions(np.array([[0]]), np.array([[0.2]], np.float32), {})
    assert (
        engines.describe_mismatch(
            Predictions(np.array([[0]]), np.array([[score]], np.float32), {}), expected, spec
        )
        == reason
    )


# them
SMALL = TESTS / "data" / "dataset-v1" / "model"


def test_labels_may_be_a_list(tmp_path: Path) -> None:
    model = Path(shutil.copytree(SMALL, tmp_path / "model"))
    edit(str(model / "config.json"), id2label=["cat", "dog", "emu"])
    assert identify(Job(source="s", model=str(model), out="o", engine="torch")).labels == (
        "cat",
        "dog",
        "emu",
    )


@pytest.mark.parametrize(
    ("prefix", "says"), [("_orig_mod.", "a compiled module"), ("module.", "a DataParallel module")]
)
def test_weights_of_a_wrapper_are_named(tmp_path: Path, prefix: str, says: str) -> None:
    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(SMALL, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    save_file(
        {f"{prefix}{name}": value for name, value in weights.items()}, model / "model.safetensors"
    )
    with pytest.raises(
        ModelError, match=f"begins with `{re.escape(prefix)}`, because {says} was saved"
    ):
        identify(Job(source="s", model=str(model), out="o", engine="torch"))
