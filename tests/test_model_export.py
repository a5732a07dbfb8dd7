"""`vitray export MODEL`: what is written is a model that says what the original says, is judged on
other images, or is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_models import every_vector, job_for, make_checkpoint, noise, open_job, run

import vitray
from vitray.cli import main
from vitray.dataset import Dataset
from vitray.decoding.decode import decode, load_decoders
from vitray.errors import Disagreement, JobError, ModelError, SourceError, StorageError
from vitray.evaluation import agreement, samples
from vitray.job import Embedding, Job
from vitray.model_export import graphs
from vitray.model_export.export import ExportedModel, export_model
from vitray.models import Predictions, engines, identify, onnx_engine
from vitray.models.checkpoint import locate
from vitray.models.exported import read_export, seal
from vitray.models.linear_head import Head, write_head
from vitray.operations import demo_model
from vitray.schema import Encoded
from vitray.vectors import top_k

FLOATS = ("onnx", "openvino", "torch-export")
SMALL = [(to, how) for to in ("onnx", "openvino") for how in graphs.QUANTISED]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 240 drawn shapes, class by class, as people's folders are."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(7)
    for kind, name in enumerate(demo_model.NAMES):
        (folder / name).mkdir()
        for n in range(40):
            demo_model.draw(kind, rng).save(folder / name / f"{n:03d}.png")
    return str(folder)


@pytest.fixture(scope="module")
def unseen() -> np.ndarray:
    rng = np.random.default_rng(11)
    return demo_model.pixels_of(
        [demo_model.draw(n % len(demo_model.NAMES), rng) for n in range(600)]
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "SECONDS", 0.2)


def export_job(model: str, photos: str, **more: object) -> Job:
    return Job(source=photos, out="o", model=model, **more)


def predictions(
    model: str, embeddings: list[Embedding] | None = None, **more: object
) -> Predictions:
    return run(
        job_for(model, engine="auto", top_k=6, embeddings=embeddings or [Embedding()], **more),
        UNSEEN[0],
    )


UNSEEN: list[np.ndarray] = []


@pytest.fixture(scope="module", autouse=True)
def _unseen(unseen: np.ndarray) -> None:
    UNSEEN[:] = [unseen]


def cosines(a: Predictions, b: Predictions) -> np.ndarray:
    x, y = a.vectors["embedding"], b.vectors["embedding"]
    return (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize("to", FLOATS)
def test_a_float_export_equals_torch_within_a_thousandth(
    tmp_path: Path, shapes_model: str, photos: str, to: str
) -> None:
    exported = export_model(export_job(shapes_model, photos), to, "", str(tmp_path / "x"), 0.999)
    assert exported.judgement.error is not None and exported.judgement.error < 1e-3
    assert (exported.judgement.agreement, exported.judgement.images, exported.judgement.apart) == (
        1.0,
        240,
        True,
    )
    small = ("config.json", "vitray_export.json", "README.md")
    files = [
        path.stat().st_size for path in (tmp_path / "x").iterdir() if not path.name.endswith(small)
    ]
    assert exported.judgement.megabytes == sum(files) / 1e6
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
    assert (exported.judgement.calibrated_on, exported.judgement.images) == (
        (120, 120) if calibrated else (0, 240)
    )
    assert exported.judgement.agreement is not None and exported.judgement.agreement >= 0.99


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


# ---------------------------------------------------------------- the directory


@pytest.fixture(scope="module")
def small(
    tmp_path_factory: pytest.TempPathFactory, shapes_model: str, photos: str
) -> tuple[str, ExportedModel]:
    """An int8 ONNX export with two embeddings."""
    into = str(tmp_path_factory.mktemp("small") / "x")
    wanted = [Embedding(), Embedding(layer=2, pool="mean")]
    return into, export_model(
        export_job(shapes_model, photos, embeddings=wanted), "onnx", "int8", into
    )


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
    assert said["judgement"]["agreement"] == exported.judgement.agreement
    card = Path(into, "README.md").read_text()
    assert (
        f"| same label | {exported.judgement.agreement:.2%} |" in card
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


def test_what_an_export_cannot_do_is_refused_with_what_it_can(
    small: tuple[str, ExportedModel], shapes_model: str, photos: str, tmp_path: Path
) -> None:
    into, _ = small
    for more, message in (
        (
            {"engine": "torch"},
            r"was exported for engine onnx, so engine torch cannot run it\. Set engine: auto\.",
        ),
        ({"precision": "bf16"}, "engine onnx computes in fp32, not in bf16"),
        (
            {"embeddings": [Embedding(layer=1)]},
            r"gives mean of layer 2, cls of layer last, and not cls of layer 1: .*export .* again",
        ),
    ):
        with pytest.raises(ModelError, match=message):
            identify(export_job(into, photos, **more))
    with pytest.raises(ModelError, match=r"is an export already \(onnx\)\. Give the checkpoint"):
        export_model(export_job(into, photos), "openvino", "", str(tmp_path / "y"))
    unlabelled = str(tmp_path / "z")
    export_model(export_job(shapes_model, photos, labels=False), "openvino", "", unlabelled)
    with pytest.raises(
        ModelError, match=r"was exported without labels; set labels: false, or export .* with them"
    ):
        identify(export_job(unlabelled, photos))
    assert predictions(unlabelled, labels=False).ids is None


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
        exported.judgement.agreement == 1.0
        and exported.judgement.error is not None
        and exported.judgement.error < 1e-3
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


# ---------------------------------------------------------------- the judgement


def test_below_min_agreement_nothing_is_written_and_the_exit_code_is_5(
    tmp_path: Path,
    shapes_model: str,
    photos: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = graphs.quantise_with_nncf

    def spoiled(graph: object, how: str, calibration: np.ndarray) -> object:
        return real(
            graph, how, np.zeros_like(calibration)
        )  # calibrated on black images: no range fits

    monkeypatch.setattr(graphs, "quantise_with_nncf", spoiled)
    command = [
        "vitray",
        "export",
        shapes_model,
        "--to",
        "openvino",
        "--int8",
        "--calibrate",
        photos,
        "--into",
        str(tmp_path / "x"),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--min-agreement", "0.99"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 5 and "same label" in said.out and len(said.err.splitlines()) == 1
    assert (
        "agree with the original, below --min-agreement 0.99; nothing was written. Calibrate on "
        "more images" in said.err
    )
    assert os.listdir(tmp_path) == []


def test_agreement_and_error_equal_those_computed_by_hand() -> None:
    ids = np.array([[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], np.int32)
    scores = np.array([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]] * 2, np.float32)
    a = Predictions(ids, scores, {"e": np.array([[1, 0], [0, 2]], np.float32)})
    other = np.array([[0, 1, 2, 3, 5, 4], [4, 5, 3, 2, 1, 0]], np.int32)
    b = Predictions(other, scores, {"e": np.array([[1, 0], [2, 0]], np.float32)})
    assert agreement.measure_agreement(a, b) == {
        "agreement": 0.5,
        "top5": (0.8 + 1) / 2,
        "cosine": 0.5,
        "least_cosine": 0.0,
    }
    assert agreement.measure_error(a, a) == 0 and agreement.measure_error(a, b) == pytest.approx(
        np.sqrt(2)
    )


def test_calibration_and_comparison_share_no_image_and_copies_count_once(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    job = export_job(shapes_model, photos)
    spec = identify(job.model_copy(update={"engine": "torch"}))
    found = samples.sample_images(job, spec, calibrates=True)
    seen = [{image.tobytes() for image in images} for images in (found.calibration, found.compared)]
    assert not seen[0] & seen[1] and (len(found.calibration), len(found.compared)) == (120, 120)
    folder = tmp_path / "few"
    folder.mkdir()
    for n, path in enumerate(sorted(Path(photos).rglob("*.png"))[::8]):
        shutil.copy(path, folder / f"{n}.png")
        shutil.copy(path, folder / f"{n}-again.png")
    (folder / "bad.png").write_bytes(b"no image")
    few = samples.sample_images(export_job(shapes_model, str(folder)), spec, calibrates=True)
    assert (len(few.calibration), len(few.compared), few.apart) == (30, 30, False)
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(photos, ".")
    assert (
        len(
            samples.sample_images(
                export_job(shapes_model, f"{tmp_path}/t.tar"), spec, calibrates=False
            ).compared
        )
        == 240
    )


@pytest.mark.parametrize("kind", ["files", "tar", "parquet"])
def test_a_sample_of_a_shard_in_which_classes_lie_side_by_side_has_all_of_them(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    paths = sorted(Path(photos).rglob("*.png"))
    source = str(tmp_path / f"shard.{kind}")
    if kind == "files":
        source = photos
    elif kind == "tar":
        with tarfile.open(source, "w") as tar:
            for n, path in enumerate(paths):
                tar.add(path, f"{n:04d}.png")
    else:
        pq.write_table(pa.table({"image": [path.read_bytes() for path in paths]}), source)
    monkeypatch.setattr(samples, "COMPARED", 90)
    monkeypatch.setattr(samples, "CALIBRATION", 60)
    job = export_job(shapes_model, source)
    spec = identify(job.model_copy(update={"engine": "torch"}))
    decode_spec = Dataset("o", job, spec, (), pa.schema([]), 1).decode_spec
    kinds = {
        decode([Encoded(0, path.name, "", path.read_bytes())], decode_spec)[0][
            0
        ].tobytes(): path.parent.name
        for path in paths
    }
    found = samples.sample_images(job, spec, calibrates=True)
    assert (len(found.calibration), len(found.compared)) == (75, 75)
    for images in (found.calibration, found.compared):
        counts = Counter(kinds[image.tobytes()] for image in images)
        assert len(counts) == 6 and min(counts.values()) >= 5


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, shapes_model: str, photos: str
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "few").mkdir()
    for path in sorted(Path(photos).rglob("*.png"))[:3]:
        shutil.copy(path, tmp_path / "few" / path.name)
    (tmp_path / "there").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    job, into = export_job(shapes_model, photos), str(tmp_path / "x")
    for act, kind, message in (
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/few"), "onnx", "", into),
            SourceError,
            "holds 3 different good images\\. .* 16",
        ),
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/none"), "onnx", "", into),
            SourceError,
            "none",
        ),
        (
            lambda: export_model(export_job(shapes_model, f"{tmp_path}/nowhere"), "onnx", "", into),
            JobError,
            "nowhere",
        ),
        (
            lambda: export_model(job, "onnx", "", str(tmp_path / "there")),
            JobError,
            "--into .* exists already: choose a new folder",
        ),
        (
            lambda: export_model(job, "onnx", "", "s3://bucket/x"),
            JobError,
            "an export is a local folder",
        ),
        (
            lambda: export_model(job, "onnx", "", "/proc/x"),
            StorageError,
            "Check the path, and that the disk has room",
        ),
        (
            lambda: export_model(job, "torch-export", "int8", into),
            JobError,
            r"has no --int8: torch's own int8 \(torchao\) needs a GPU",
        ),
        (
            lambda: export_model(
                export_job(shapes_model, photos, head="h"), "torch-export", "", into
            ),
            JobError,
            "keeps the checkpoint's own labels",
        ),
        (
            lambda: export_model(
                export_job(shapes_model, photos, labels=["a"]), "torch-export", "", into
            ),
            JobError,
            "Use --to onnx or openvino",
        ),
        (
            lambda: export_model(job, "coreml", "int8", into),
            JobError,
            "--to coreml has no --int8: .*Use --fp16",
        ),
        (
            lambda: export_model(job, "tflite", "", into),
            JobError,
            "choose one of onnx, openvino, torch-export, coreml",
        ),
        (
            lambda: export_model(export_job(f"{tmp_path}/none", photos), "onnx", "", into),
            ModelError,
            r"holds no config\.json",
        ),
    ):
        with pytest.raises(kind, match=message) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


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


def test_a_disk_that_fills_up_within_a_library_is_a_storage_error(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_short(source: graphs.Source, how: str, folder: Path) -> None:
        """As a library of C++ that looks at no answer of the disk; the judge cannot open what it
        left.
        """
        real(source, how, folder)
        (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:50_000])
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 4096, 4096)
        )

    real, into = graphs.WRITERS["onnx"], str(tmp_path / "x")
    monkeypatch.setitem(graphs.WRITERS, "onnx", cut_short)
    with pytest.raises(
        StorageError, match=rf"^{into}: .*\. Check the path, and that the disk has room\.$"
    ) as raised:
        export_model(export_job(shapes_model, photos), "onnx", "", into)
    assert "\n" not in str(raised.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", FLOATS)
def test_a_disk_that_is_really_full_is_one_line_and_the_process_lives(
    tmp_path: Path, shapes_model: str, photos: str, to: str
) -> None:
    limit = 300_000  # bytes a file may have: less than the weights
    load_decoders("exact")  # Numba keeps what it compiled

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    into = str(tmp_path / "x")
    command = [
        sys.executable,
        "-m",
        "vitray",
        "export",
        shapes_model,
        "--to",
        to,
        "--calibrate",
        photos,
        "--into",
        into,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=few_bytes
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]
    assert done.stderr.startswith(f"StorageError: {into}: ") and done.stderr.endswith(
        "and that the disk has room.\n"
    )
    assert os.listdir(tmp_path) == []


def test_a_library_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, shapes_model: str, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = export_job(shapes_model, photos)
    for module, to, how, extra in (
        ("nncf", "openvino", "int8", "quantise"),
        ("coremltools", "coreml", "", "coreml"),
        ("onnxscript", "onnx", "", "onnx"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(JobError, match=rf"needs {module}: pip install 'vitray\[{extra}\]'"):
                export_model(job, to, how, str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--calibrate SOURCE is missing"),
        (["--calibrate", "p", "--int8", "--fp16"], "choose one of --int8, --fp16"),
        (
            ["--calibrate", "p", "--vectors"],
            "vitray export-model takes no --vectors: that is an option of vitray export",
        ),
    ],
)
def test_the_command_says_which_options_belong_together(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["vitray", "export", "m", "--to", "onnx", "--into", "x", *more]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setattr(
        sys,
        "argv",
        ["vitray", "export", "out", "--to", "npy", "--into", "x", "--int8"],
    )
    with pytest.raises(SystemExit):
        main()
    message = "vitray export takes no --int8: that is an option of vitray export-model"
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- engines


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
    assert "runs on the CPU, and this job on cuda" in (
        engines.refusal("onnx", "cuda", "fp32") or ""
    )
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [cuda, cpu])
    assert engines.refusal("onnx", "cuda", "fp32") is None
    assert "runs on the CPU" in (engines.refusal("onnx", "xpu", "fp32") or "")
    with pytest.raises(ModelError, match="decode: gpu leaves pixels to engine torch"):
        engines.require_pixels("onnx", "gpu")
    engines.require_pixels("torch", "gpu")


def test_equal_scores_are_ranked_by_id() -> None:
    scores, ids = top_k(np.array([[0.25, 0.5, 0.25]], np.float32), 2)
    assert ids.tolist() == [[1, 0]] and scores.tolist() == [[0.5, 0.25]]


@pytest.mark.nightly
def test_nncf_sends_no_telemetry(tmp_path: Path, shapes_model: str, photos: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys\nfrom vitray.cli import main\n"
        f"sys.argv = ['vitray', 'export', {shapes_model!r}, '--to', 'openvino', '--int8', "
        f"'--json', '--calibrate', {photos!r}, "
        f"'--into', {str(tmp_path / 'x')!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert sys.modules['nncf'] and not any(sys.modules[m] for m in sys.modules if "
        "m.startswith('openvino_telemetry'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["judgement"]["agreement"] >= 0.95 and done.stderr == ""
    assert not list(home.glob("intel*"))


def test_disagreement_is_an_error_of_its_own() -> None:
    assert Disagreement.exit_code == 5 and not issubclass(Disagreement, JobError)
