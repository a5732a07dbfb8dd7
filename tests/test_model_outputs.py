"""Scores: what transformers' image-classification pipeline gives, for one output, several and
regression, on every engine.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path

import hand_made
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from small_models import edit, job_for, make_checkpoint, noise, run
from transformers import AutoImageProcessor, pipeline

from vitray.consume.comparing import compare
from vitray.consume.report import report
from vitray.dataset import Dataset, open_dataset, resolve_dataset
from vitray.errors import FingerprintError, ModelError
from vitray.job import Embedding, Job
from vitray.model_export.export import export_model
from vitray.models import Predictions, engines, identify
from vitray.models.checkpoint import hash_weights, locate, read_config
from vitray.models.exported import seal
from vitray.models.linear_head import Head, write_head
from vitray.operations.validation import validate
from vitray.schema import ModelSpec, ScoreFunction

IMAGES = 5
DATASETS_V1 = Path(__file__).parent / "data" / "dataset-v1" / "out"

ONE = {"num_labels": 1}
ONE_OF_MANY = {"num_labels": 1, "problem_type": "multi_label_classification"}
VALUE = {"num_labels": 1, "problem_type": "regression"}
VALUES = {"num_labels": 3, "problem_type": "regression"}
CLASSES = {"num_labels": 3}
TAGS = {"num_labels": 3, "problem_type": "multi_label_classification"}

HEADS = [
    pytest.param(ONE, ScoreFunction.SIGMOID, id="one"),
    pytest.param(ONE_OF_MANY, ScoreFunction.SIGMOID, id="one-multi-label"),
    pytest.param(VALUE, ScoreFunction.NONE, id="one-regression"),
    pytest.param(VALUES, ScoreFunction.NONE, id="three-regression"),
    pytest.param(CLASSES, ScoreFunction.SOFTMAX, id="three"),
    pytest.param(TAGS, ScoreFunction.SIGMOID, id="three-multi-label"),
]


def of_pipeline(model: str, pixels: np.ndarray) -> list[list[tuple[str, float]]]:
    """Labels and scores of each image, best first, by transformers alone."""
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    classify = pipeline(
        "image-classification", model=model, image_processor=processor, device="cpu"
    )
    answers = classify([Image.fromarray(image) for image in pixels])
    return [[(one["label"], one["score"]) for one in answer] for answer in answers]


def require_pipeline(found: Predictions, spec: ModelSpec, model: str, pixels: np.ndarray) -> None:
    expected = of_pipeline(model, pixels)
    assert [[spec.labels[i] for i in ids] for ids in found.ids] == [
        [label for label, _ in one] for one in expected
    ]
    np.testing.assert_allclose(
        found.scores, [[score for _, score in one] for one in expected], rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------- every engine


@pytest.mark.parametrize(("head", "function"), HEADS)
def test_scores_are_those_of_the_transformers_pipeline(
    tmp_path: Path, head: dict[str, object], function: ScoreFunction
) -> None:
    model, pixels = make_checkpoint(tmp_path, "vit", True, **head), noise(IMAGES)
    spec = identify(job_for(model))
    assert spec.score_function is function
    require_pipeline(run(job_for(model), pixels, spec), spec, model, pixels)


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
@pytest.mark.parametrize("head", [ONE, VALUES], ids=["one", "three-regression"])
def test_other_engines_give_the_scores_of_the_pipeline(
    tmp_path: Path, head: dict[str, object], engine: str
) -> None:
    model, pixels = make_checkpoint(tmp_path, "vit", True, **head), noise(IMAGES)
    job = job_for(model, engine=engine)
    spec = identify(job)
    assert spec.engine == engine
    require_pipeline(run(job, pixels, spec), spec, model, pixels)


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


@pytest.mark.parametrize("to", ["onnx", "openvino"])
@pytest.mark.parametrize("head", [ONE, VALUES], ids=["one", "regression"])
def test_an_export_gives_the_scores_of_its_checkpoint(
    tmp_path: Path, to: str, head: dict[str, object]
) -> None:
    model, pixels = make_checkpoint(tmp_path / "m", "vit", True, **head), noise(IMAGES)
    into = exported(tmp_path, model, to)
    job = job_for(into, engine="auto")
    spec, original = identify(job), identify(job_for(model))
    assert (spec.engine, spec.labels, spec.score_function) == (
        to,
        original.labels,
        original.score_function,
    )
    require_pipeline(run(job, pixels, spec), spec, model, pixels)


@pytest.mark.parametrize(
    ("head", "needed"), [(ONE, "a sigmoid"), (VALUES, "raw values")], ids=["one", "regression"]
)
def test_an_export_whose_graph_has_the_old_softmax_is_refused(
    tmp_path: Path, head: dict[str, object], needed: str
) -> None:
    into = exported(tmp_path, make_checkpoint(tmp_path / "m", "vit", True, **head), "onnx")
    file = Path(into, "vitray_export.json")
    file.write_text(
        json.dumps(seal({**json.loads(file.read_text()), "multi_label": False}))
    )  # as it was written then
    with pytest.raises(
        ModelError, match=f"a softmax where transformers gives {needed}. Export m again"
    ):
        identify(job_for(into, engine="auto"))
    assert (
        identify(job_for(into, False, [Embedding()], engine="auto")).labels == ()
    )  # embeddings are what they were


def exported(folder: Path, model: str, to: str) -> str:
    (folder / "photos").mkdir()
    for n, image in enumerate(noise(20, 40)):
        Image.fromarray(image).save(folder / "photos" / f"{n}.png")
    job = Job(source=str(folder / "photos"), out="o", model=model, embeddings=[Embedding()])
    return export_model(job, to, "", str(folder / "x")).into


# ---------------------------------------------------------------- heads and words


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


# ---------------------------------------------------------------- the choice of an engine


@dataclasses.dataclass(frozen=True)
class Case:
    """What an engine says against [[0.5, -1], [-2, -3]] of torch, and how it strays."""

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
    assert engines.strays(found, expected, spec) == case.reason


@pytest.mark.parametrize(
    ("score", "reason"),
    [(0.2, None), (0.2009, None), (0.9, "a score 0.7 off that of torch in fp32")],
)
def test_engines_of_one_output_agree_by_value(score: float, reason: str | None) -> None:
    spec = dataclasses.replace(hand_made.spec_of("m"), labels=("a",), multi_label=True)
    expected = Predictions(np.array([[0]]), np.array([[0.2]], np.float32), {})
    assert (
        engines.strays(
            Predictions(np.array([[0]]), np.array([[score]], np.float32), {}), expected, spec
        )
        == reason
    )


# ---------------------------------------------------------------- datasets of before


def resolved(job: Job, spec: ModelSpec) -> Dataset:
    return resolve_dataset(job, spec, [], pa.schema([]), "2026-11-30T00:00:00+00:00")


def written_before(job: Job, spec: ModelSpec) -> str:
    """Fingerprint of a dataset as the first version made it: a softmax unless the config said
    multi-label; no `regression`.
    """
    declared = read_config(locate(job.model, None)).hf.problem_type == "multi_label_classification"
    dataset = resolved(job, dataclasses.replace(spec, multi_label=declared, regression=False))
    file = Path(job.out, "_vitray", "dataset.json")
    document = json.loads(file.read_text())
    del document["facts"]["regression"]
    file.write_text(json.dumps(document))
    return dataset.fingerprint


def job_into(folder: Path, model: str, labels: bool = True) -> Job:
    embeddings = [] if labels else [Embedding()]
    return job_for(model, labels, embeddings, batch_size=4).model_copy(
        update={"out": str(folder / "out")}
    )


@pytest.mark.parametrize(
    "head", [CLASSES, TAGS, ONE_OF_MANY], ids=["softmax", "multi-label", "one-multi-label"]
)
def test_datasets_of_before_keep_their_fingerprint(tmp_path: Path, head: dict[str, object]) -> None:
    job = job_into(tmp_path, make_checkpoint(tmp_path / "m", "vit", True, **head))
    spec = identify(job)
    before = written_before(job, spec)
    found = open_dataset(job.out)
    assert found is not None and found.fingerprint == before and found.spec == spec
    assert resolved(job, spec).fingerprint == before
    assert "score_function" not in found.deciding()


@pytest.mark.parametrize(
    "head", [ONE, VALUE, VALUES], ids=["one", "one-regression", "three-regression"]
)
def test_datasets_with_the_old_scores_do_not_go_on(tmp_path: Path, head: dict[str, object]) -> None:
    job = job_into(tmp_path, make_checkpoint(tmp_path / "m", "vit", True, **head))
    spec = identify(job)
    before = written_before(job, spec)
    found = open_dataset(job.out)  # it can still be read
    assert found is not None and found.fingerprint == before
    with pytest.raises(FingerprintError, match="labels differs"):
        resolved(job, spec)


@pytest.mark.parametrize("head", [ONE, VALUE, TAGS], ids=["one", "regression", "multi-label"])
def test_datasets_of_embeddings_alone_go_on_whatever_the_head(
    tmp_path: Path, head: dict[str, object]
) -> None:
    job = job_into(tmp_path, make_checkpoint(tmp_path / "m", "vit", True, **head), labels=False)
    spec = identify(job)
    before = written_before(job, spec)
    assert resolved(job, spec).fingerprint == before


def test_sigmoid_and_raw_scores_of_the_same_weights_are_two_datasets(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "m", "vit", True, **TAGS)
    job = job_into(tmp_path, model)
    resolved(job, identify(job))
    edit(f"{model}/config.json", problem_type="regression")
    with pytest.raises(FingerprintError, match=r"score_function differs \(null, this job: none\)"):
        resolved(job, identify(job))


@pytest.mark.parametrize("kind", ["files", "manifest", "parquet", "tars"])
def test_the_first_formats_datasets_open_as_softmax(kind: str) -> None:
    found = open_dataset(str(DATASETS_V1 / kind))
    assert found is not None and found.spec.score_function is ScoreFunction.SOFTMAX


# ---------------------------------------------------------------- checks


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


# ---------------------------------------------------------------- files as other programs leave
# them

SMALL = Path(__file__).parent / "data" / "dataset-v1" / "model"


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
