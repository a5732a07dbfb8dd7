"""Datasets whose scores have another meaning keep their fingerprint and do not go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from factories.small_models import edit, job_for, make_checkpoint
from support.model_heads import CLASSES, ONE, ONE_OF_MANY, TAGS, VALUE, VALUES
from support.paths import TESTS
from vitray.dataset import Dataset, open_dataset, resolve_dataset
from vitray.errors import FingerprintError
from vitray.job import Embedding, Job
from vitray.models import identify
from vitray.models.checkpoint import read_config
from vitray.models.checkpoint_store import locate
from vitray.schema import ModelSpec, ScoreFunction

DATASETS_V1 = TESTS / "data" / "dataset-v1" / "out"


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
    assert "score_function" not in found.fingerprint_fields()


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
