"""`vitray export-model` writes a model that gives the original's results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import vitray
from factories.small_models import job_for, open_job, run
from support.model_exports import UNSEEN, export_job
from support.schemas import checked
from vitray.cli.json_output import json_text
from vitray.errors import ModelError, StorageError
from vitray.evaluation import agreement
from vitray.job import Embedding
from vitray.model_export.export import ExportedModel, export_model
from vitray.models import Predictions, engines, identify, onnx_engine
from vitray.models.checkpoint_store import locate
from vitray.models.exported import read_export, seal
from vitray.models.linear_head import Head, write_head
from vitray.operations import demo_model


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def test_the_directory_describes_the_export_and_its_original(
    small: tuple[str, ExportedModel], shapes_model: str
) -> None:
    into, exported = small
    assert sorted(os.listdir(into)) == [
        *(
            "README.md",
            "config.json",
            "model.onnx",
            "preprocessor_config.json",
            "vitray_export.json",
        ),
    ]
    said = json.loads(Path(into, "vitray_export.json").read_text())
    digest = hashlib.sha256(Path(into, "model.onnx").read_bytes()).hexdigest()
    assert said["graph"] == {"model.onnx": digest} and exported.weights_sha256 == digest
    original = hashlib.sha256(Path(shapes_model, "model.safetensors").read_bytes()).hexdigest()
    assert said["source_weights_sha256"] == original and said["source"] == os.path.basename(
        shapes_model
    )
    assert tuple(said["labels"]) == demo_model.NAMES and said["multi_label"] is False
    assert (said["to"], said["quantisation"], said["results"]) == (
        "onnx",
        "int8",
        ["scores", "mean_2", "cls_last"],
    )
    assert said["judgement"] == asdict(exported.comparison.figures())
    assert checked(json_text(exported.figures()))["judgement"] == said["judgement"]
    assert list(said["judgement"]) == [
        "images", "calibrated_on", "apart", "megabytes", "ratio", "torch_precision", "precision",
        "agreement", "top5", "cosine", "least_cosine", "error", "speed", "slowest", "fastest",
        "images_s", "torch_images_s",
    ]  # fmt: skip
    card = Path(into, "README.md").read_text()
    assert (
        f"| same label | {exported.comparison.share():.2%} |" in card
        and original in card
        and "| speed |" in card
    )
    everything = b"".join(path.read_bytes() for path in Path(into).iterdir())
    assert (
        os.path.dirname(shapes_model).encode() not in everything
        and b"site-packages" not in everything
    )


def test_an_export_is_a_model_of_a_run_and_its_graph_is_in_the_fingerprint(
    small: tuple[str, ExportedModel], shapes_model: str, photos: str, tmp_path: Path
) -> None:
    into, exported = small
    tables = {}
    for name, model, engine in (("a", shapes_model, "torch"), ("b", into, "auto")):
        job = vitray.Job(
            source=photos,
            model=model,
            engine=engine,
            out=str(tmp_path / name),
            device="cpu",
            top_k=2,
        )
        vitray.run(job)
        tables[name] = vitray.read(
            job.out, columns=["key", "label", "top_scores", "embedding"]
        ).sort_by("key")
    assert tables["a"]["key"].equals(tables["b"]["key"])
    same = np.mean(
        [x == y for x, y in zip(tables["a"]["label"].to_pylist(), tables["b"]["label"].to_pylist())]
    )
    assert same >= 0.99 and {len(scores) for scores in tables["b"]["top_scores"].to_pylist()} == {2}
    frozen = json.loads((tmp_path / "b/_vitray/dataset.json").read_text())
    assert (
        frozen["deciding"]["weights"] == exported.weights_sha256
        and frozen["facts"]["engine"] == "onnx"
    )
    file = next((tmp_path / "b/data").iterdir())
    assert exported.weights_sha256.encode() in b"".join(pq.read_metadata(file).metadata.values())


def test_a_graph_that_changed_is_not_opened(
    small: tuple[str, ExportedModel], photos: str, tmp_path: Path
) -> None:
    copy = str(tmp_path / "copy")
    shutil.copytree(small[0], copy)
    job = job_for(copy, engine="auto", embeddings=[Embedding()])
    spec = identify(job)
    with open(f"{copy}/model.onnx", "ab") as file:
        file.write(b"\0")
    for act in (lambda: identify(job), lambda: open_job(job, spec)):
        with pytest.raises(
            ModelError, match=r"model\.onnx is not the file that was exported: its sha256 changed"
        ):
            act()
    os.unlink(f"{copy}/model.onnx")
    with pytest.raises(
        ModelError,
        match=r"model\.onnx cannot be read \(No such file or directory\)\. Copy the whole "
        r"directory",
    ):
        identify(job)
    for text in ("[]", "{}", '{"format": 9}'):
        Path(copy, "vitray_export.json").write_text(text)
        with pytest.raises(ModelError, match=r"vitray_export\.json is not"):
            identify(job)


def test_labels_of_an_export_that_were_touched_are_refused(
    small: tuple[str, ExportedModel], photos: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small[0], copy)
    said = json.loads((copy / "vitray_export.json").read_text())
    for labels in (said["labels"][::-1], said["labels"][:-1]):
        (copy / "vitray_export.json").write_text(json.dumps(said | {"labels": labels}))
        with pytest.raises(
            ModelError,
            match=r"is not one that vitray wrote \(it was changed\)\. Export the model again",
        ):
            identify(export_job(str(copy), photos))


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_head_goes_into_the_graph(
    to: str, tmp_path: Path, shapes_model: str, photos: str
) -> None:
    values = np.random.default_rng(3).normal(size=(3, 64)).astype(np.float32)
    weights = identify(job_for(shapes_model)).weights_sha256
    write_head(
        str(tmp_path), Head(("a", "b", "c"), values, values[:, 0], None, "cls", False, "m", weights)
    )
    into = str(tmp_path / "x")
    exported = export_model(
        export_job(shapes_model, photos, embeddings=[], head=str(tmp_path), precision="fp32"),
        to,
        "",
        into,
    )
    assert (
        exported.comparison.share() == 1.0
        and exported.comparison.error is not None
        and exported.comparison.error < 1e-3
    )
    expected = run(job_for(shapes_model, top_k=3, head=str(tmp_path)), UNSEEN[0])
    found = run(job_for(into, top_k=3, engine="auto"), UNSEEN[0])
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3, atol=1e-6)


def test_graph_files_are_named_by_us_and_lie_in_the_directory(
    small: tuple[str, ExportedModel], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small[0], copy)
    said = json.loads((copy / "vitray_export.json").read_text())
    (copy / "vitray_export.json").write_text(
        json.dumps(seal(said | {"graph": {"../secret.onnx": "0" * 64}}))
    )
    with pytest.raises(
        ModelError, match=r"is not one that vitray wrote \(graph files \.\./secret\.onnx\)"
    ):
        read_export(locate(str(copy), None))


def test_a_graph_reads_no_file_outside_its_directory(tmp_path: Path) -> None:
    """ONNX may name a file for its weights: a stranger's could name anybody's."""
    import onnx

    (tmp_path / "secret").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "model").mkdir()
    secret = onnx.TensorProto(
        name="w",
        data_type=onnx.TensorProto.FLOAT,
        dims=[4],
        data_location=onnx.TensorProto.EXTERNAL,
    )
    secret.external_data.add(key="location", value="../secret")
    pixels, out = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4])
        for name in ("pixels", "out")
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["pixels", "w"], ["out"])], "g", [pixels], [out], [secret]
    )
    exported = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10
    )
    (tmp_path / "model/model.onnx").write_bytes(exported.SerializeToString())
    with pytest.raises(Exception, match=r"(?i)external|escape|outside"):
        onnx_engine.open_graph(str(tmp_path / "model/model.onnx"), "cpu")


def test_agreement_and_error_equal_those_computed_by_hand() -> None:
    ids = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], np.int32)
    scores = np.array([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]] * 2, np.float32)
    a = Predictions(ids, scores, {"e": np.array([[1, 0], [0, 2]], np.float32)})
    other = np.array([[0, 1, 2, 3, 5, 4], [4, 5, 3, 2, 1, 0]], np.int32)
    b = Predictions(other, scores, {"e": np.array([[1, 0], [2, 0]], np.float32)})
    assert agreement.measure_agreement(a, b) == agreement.Agreement(0.5, 0.9, 0.5, 0.0)
    assert agreement.measure_error(a, a) == 0 and agreement.measure_error(a, b) == pytest.approx(
        np.sqrt(2)
    )


def test_too_little_space_is_reported_before_anything_is_computed(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.path.getsize(f"{shapes_model}/model.safetensors")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
    )
    with pytest.raises(
        StorageError,
        match=r"an export may take 1\.4 MB for a while, and 0\.5 MB are free\. Make room",
    ):
        export_model(export_job(shapes_model, photos), "openvino", "", str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_onnx_takes_the_best_of_what_is_there_on_a_gpu_and_the_cpu_alone_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensorrt, cuda, cpu = (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    )
    assert onnx_engine.providers("cuda", [cpu, cuda, "AzureExecutionProvider", tensorrt]) == [
        tensorrt,
        cuda,
        cpu,
    ]
    assert onnx_engine.providers("cuda", [cuda, cpu]) == [cuda, cpu]
    assert (
        onnx_engine.providers("cpu", [tensorrt, cuda, cpu])
        == onnx_engine.providers("cuda", [cpu])
        == [cpu]
    )
    assert "runs on the CPU, and this job on cuda" in str(
        engines.engine_refusal("onnx", "cuda", "fp32")
    )
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [cuda, cpu])
    assert engines.engine_refusal("onnx", "cuda", "fp32") is None
    assert "runs on the CPU" in str(engines.engine_refusal("onnx", "xpu", "fp32"))
    with pytest.raises(ModelError, match="decode: gpu leaves pixels to engine torch"):
        engines.require_pixels("onnx", "gpu")
    engines.require_pixels("torch", "gpu")
