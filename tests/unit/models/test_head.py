"""A linear head labels a run in its own pass, with every engine."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from factories.small_models import job_for, make_checkpoint, noise, run
from support.linear_heads import IMAGES, NAMES, READS, expected_scores, make_head
from support.text_towers import by_label
from vitray.errors import ModelError
from vitray.job import Embedding
from vitray.models import identify, open_model
from vitray.models.checkpoint import hash_weights
from vitray.models.checkpoint_store import locate
from vitray.models.linear_head import read_head, write_head
from vitray.schema import ModelOutputs


@pytest.mark.parametrize(("layer", "pool", "normalize"), READS)
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "siglip", "beit_mean"])
def test_a_run_labels_by_the_head_in_the_same_pass(
    tmp_path: Path, name: str, layer: int | None, pool: str, normalize: bool
) -> None:
    if name == "siglip" and pool == "cls":
        pool = "mean"
    model = make_checkpoint(tmp_path / "m", name, name == "vit")
    url = make_head(tmp_path / "head", model, layer, pool, normalize)
    expected = [
        Embedding(layer=layer or "last", pool=pool, normalize=normalize),
        Embedding(layer=3, pool="mean"),
    ]
    vectors = run(job_for(model, False, expected), noise(IMAGES)).vectors
    scores = expected_scores(next(iter(vectors.values())), read_head(url))
    assert np.ptp(scores, axis=1).min() > 0.05
    for embeddings in ([], expected):
        output = run(job_for(model, embeddings=embeddings, head=url), noise(IMAGES))
        np.testing.assert_allclose(by_label(output), scores, atol=1e-4)
        for column, values in output.vectors.items():
            np.testing.assert_allclose(values, vectors[column], atol=1e-5)
    spec = identify(job_for(model, head=url))
    assert (spec.labels, spec.multi_label) == (NAMES, False)


def test_bf16_labels_are_those_of_fp32_where_its_margin_is_clear(vit: str, tmp_path: Path) -> None:
    url = make_head(tmp_path / "head", vit)
    exact = run(job_for(vit, head=url), noise(400))
    clear = exact.scores[:, 0] - exact.scores[:, 1] > 0.05
    assert clear.mean() > 0.3
    output = run(job_for(vit, head=url, precision="bf16"), noise(400))
    assert (output.ids[clear, 0] == exact.ids[clear, 0]).mean() >= 0.995


def test_a_head_that_does_not_fit_is_refused_in_one_line(vit: str, tmp_path: Path) -> None:
    def refused(url: str) -> str:
        with pytest.raises(ModelError) as raised:
            identify(job_for(vit, head=url))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    foreign = make_head(tmp_path / "foreign", vit, weights_sha256="5" * 64)
    weights = hash_weights(locate(vit, None))[:12]
    assert (
        f"{foreign} is for {vit} (weights 555555555555…), and the embeddings are of {vit} ({weights}…)"
        in refused(foreign)
    )
    assert "has no layer 9: layers are 1..3 or last" in refused(
        make_head(tmp_path / "high", vit, 9)
    )
    wide = np.ones((4, 48), np.float32)
    assert "takes 48 values, and an embedding" in refused(
        make_head(tmp_path / "wide", vit, weight=wide)
    )
    for directory in (f"{tmp_path}/nothing", vit):  # a whole checkpoint is none
        message = refused(directory)
        assert (
            f"head {directory} cannot be read: {directory}/head.json does not exist. Give a "
            f"directory with head.json" in message
        )
    url = make_head(tmp_path / "head", vit)
    job = job_for(vit, head=url)
    spec = identify(job)
    write_head(url, replace(read_head(url), bias=np.ones(4, np.float32)))
    with pytest.raises(ModelError, match="changed since it was planned"):
        open_model(spec, ModelOutputs((), 1), "cpu", 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"pool": "banana"}, "layer 'last', pool 'banana', normalize False"),
        ({"normalize": "false"}, "layer 'last', pool 'cls', normalize 'false'"),
        *(
            ({"layer": layer}, f"layer {layer!r}, pool 'cls', normalize False")
            for layer in (2.7, True, 0, "2", None)
        ),
        ({"labels": "abcd"}, "its labels are not a list"),
        ({"labels": ["a", "b", "c"]}, "weight [4, 32], bias [4] and 3 labels do not fit"),
        ({"labels": ["a", "b", "c", None]}, "None is not text"),
        ({"labels": ["a", "b", "c", "a"]}, "label a appears twice"),
        ({"labels": ["a", "b", "c", ""]}, "label 4 is empty"),
        ({"labels": []}, "no label"),
        ({"labels": None}, "its labels are not a list"),
    ],
)
def test_a_head_that_no_training_wrote_is_refused(
    vit: str, tmp_path: Path, fields: dict[str, object], says: str
) -> None:
    url = Path(make_head(tmp_path / "head", vit))
    (url / "head.json").write_text(json.dumps(json.loads((url / "head.json").read_text()) | fields))
    with pytest.raises(ModelError, match=f"^head {url} cannot be read: {re.escape(says)}"):
        read_head(str(url))


def test_a_head_of_other_numbers_or_of_endless_brackets_is_refused(
    vit: str, tmp_path: Path
) -> None:
    url = Path(make_head(tmp_path / "head", vit))
    save_file(
        {"weight": np.ones((4, 32), np.float32), "bias": np.ones(4)}, url / "head.safetensors"
    )
    with pytest.raises(ModelError, match="weight and bias are float32 and float64, not float32"):
        read_head(str(url))
    (url / "head.json").write_text("[" * 200_000)
    with pytest.raises(ModelError, match=f"head {url} cannot be read: maximum recursion depth"):
        read_head(str(url))
