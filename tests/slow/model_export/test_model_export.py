"""`vitray export-model` writes a model that gives the original's results."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import vitray
from factories.small_models import every_vector, job_for, make_checkpoint, noise, open_job, run
from support.model_exports import FLOATS, UNSEEN, export_job, predictions
from vitray.errors import JobError, ModelError
from vitray.evaluation import agreement
from vitray.job import Embedding
from vitray.model_export import graphs
from vitray.model_export.export import export_model
from vitray.models import Predictions, identify
from vitray.vectors import top_k

SMALL = [(to, how) for to in ("onnx", "openvino") for how in graphs.QUANTISED]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def cosines(a: Predictions, b: Predictions) -> np.ndarray:
    x, y = a.vectors["embedding"], b.vectors["embedding"]
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


@pytest.mark.parametrize(("to", "how"), SMALL)
def test_a_quantised_export_agrees_and_is_smaller(
    tmp_path: Path, shapes_model: str, photos: str, to: str, how: str
) -> None:
    exported = export_model(export_job(shapes_model, photos), to, how, str(tmp_path / "x"))
    expected = run(job_for(shapes_model, top_k=6, embeddings=[Embedding()]), UNSEEN[0])
    found = predictions(str(tmp_path / "x"), precision="auto")
    assert (found.ids[:, 0] == expected.ids[:, 0]).mean() >= 0.99
    assert np.quantile(cosines(found, expected), 0.05) >= 0.98
    assert np.abs(found.scores - expected.scores).max() > 0, "nothing was quantised"
    weights = {"onnx": "model.onnx", "openvino": "openvino_model.bin"}[to]
    # a tiny model's graph weighs as much as its weights: OpenVINO's is apart, ONNX's in the same
    # file
    most = {"fp16": 0.55, "int8": 0.4, "int8-weights": 0.4, "int4-weights": 0.3}[how] + (
        0.1 if to == "onnx" else 0
    )
    assert os.path.getsize(tmp_path / "x" / weights) <= most * os.path.getsize(
        f"{shapes_model}/model.safetensors"
    )
    calibrated = how == "int8"
    assert (exported.comparison.calibrated_on, exported.comparison.images) == (
        (120, 120) if calibrated else (0, 240)
    )
    assert exported.comparison.share() is not None and exported.comparison.share() >= 0.99


def test_every_vector_of_every_family_comes_out_of_its_graph(tmp_path: Path, photos: str) -> None:
    for name in ("clip", "siglip", "dinov2"):
        directory = make_checkpoint(tmp_path / name, name, False)
        wanted = every_vector(name != "siglip")
        export_model(
            export_job(directory, photos, labels=False, embeddings=wanted),
            "onnx",
            "",
            str(tmp_path / f"{name}-x"),
        )
        halved = [
            e.model_copy(update={"normalize": True, "dtype": "float16"}) for e in wanted[::-1]
        ]
        pixels = noise(17)
        expected = run(job_for(directory, False, halved), pixels)
        found = run(job_for(str(tmp_path / f"{name}-x"), False, halved, engine="auto"), pixels)
        assert found.ids is None and found.vectors.keys() == expected.vectors.keys()
        for column, values in expected.vectors.items():
            assert found.vectors[column].dtype == np.float16
            np.testing.assert_allclose(found.vectors[column], values, atol=2e-3, err_msg=column)


def test_core_ml_is_converted_and_its_graph_is_checked(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    import coremltools

    export_model(export_job(shapes_model, photos), "coreml", "fp16", str(tmp_path / "x"))
    said = (
        coremltools.models.MLModel(str(tmp_path / "x/model.mlpackage"), skip_model_load=True)
        .get_spec()
        .description
    )
    fields = {
        field.name: tuple(field.type.multiArrayType.shape) for field in (*said.input, *said.output)
    }
    assert fields == {"pixels": (1, 32, 32, 3), "scores": (1, 6), "cls_last": (1, 64)}
    with pytest.raises(
        ModelError,
        match=r"Core ML export, which runs in apps on Apple's devices\. Use the checkpoint that it "
        r"was made from here",
    ):
        identify(export_job(str(tmp_path / "x"), photos))
    with pytest.raises(JobError, match="--min-agreement: Core ML does not run here"):
        export_model(export_job(shapes_model, photos), "coreml", "", str(tmp_path / "y"), 0.9)


def test_a_torch_export_is_opened_by_its_safetensors_and_never_by_its_archive(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    into = str(tmp_path / "x")
    export_model(export_job(shapes_model, photos), "torch-export", "", into)
    with zipfile.ZipFile(f"{into}/model.pt2") as archive:
        said = b"".join(archive.read(name) for name in archive.namelist())
    assert (
        b"site-packages" not in said and os.path.dirname(vitray.__file__).encode() not in said
    )  # no path of this machine
    Path(into, "model.pt2").write_bytes(b"would be unpickled")
    job = job_for(into, engine="torch", embeddings=[Embedding(layer=1)])
    assert (
        identify(job).weights_sha256
        == identify(job.model_copy(update={"model": shapes_model})).weights_sha256
    )
    assert np.array_equal(
        run(job, UNSEEN[0]).ids, run(job.model_copy(update={"model": shapes_model}), UNSEEN[0]).ids
    )
    spec = identify(job)
    other = make_checkpoint(tmp_path / "other", "vit", True)
    shutil.copy(f"{other}/model.safetensors", into)
    for act in (lambda: identify(job), lambda: open_job(job, spec)):
        with pytest.raises(
            ModelError,
            match=r"its safetensors are not those that were exported\. Copy the whole directory "
            r"again",
        ):
            act()


@pytest.mark.parametrize("to", FLOATS)
def test_a_float_export_equals_torch_within_a_thousandth(
    tmp_path: Path, shapes_model: str, photos: str, to: str
) -> None:
    exported = export_model(export_job(shapes_model, photos), to, "", str(tmp_path / "x"), 0.999)
    assert exported.comparison.error is not None and exported.comparison.error < 1e-3
    assert (
        exported.comparison.share(),
        exported.comparison.images,
        exported.comparison.is_disjoint,
    ) == (
        1.0,
        240,
        True,
    )
    small = ("config.json", "vitray_export.json", "README.md")
    files = [
        path.stat().st_size for path in (tmp_path / "x").iterdir() if not path.name.endswith(small)
    ]
    assert exported.comparison.size.megabytes == sum(files) / 1e6
    expected = run(job_for(shapes_model, top_k=6, embeddings=[Embedding()]), UNSEEN[0])
    if to == "torch-export":  # what others open
        program = torch.export.load(str(tmp_path / "x/model.pt2")).module()
        with torch.no_grad():
            scores, vector = (result.numpy() for result in program(torch.from_numpy(UNSEEN[0])))
        found = Predictions(*top_k(scores, 6)[::-1], {"embedding": vector})
    else:
        found = predictions(str(tmp_path / "x"))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        found.vectors["embedding"], expected.vectors["embedding"], rtol=1e-3, atol=1e-4
    )
