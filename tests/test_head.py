"""A linear head labels a run in its own pass, or a finished dataset by the embeddings that are
there; both say the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import new_bucket
from PIL import Image
from safetensors.numpy import save_file
from small_models import job_for, make_checkpoint, noise, run
from test_zero_shot import by_label

import vitray
from vitray.consume.comparing import compare
from vitray.consume.report import report, write_card
from vitray.dataset import forget, open_dataset, shards_to_redo
from vitray.errors import FingerprintError, JobError, ModelError
from vitray.job import Embedding, Job
from vitray.models import identify, open_model, vector_columns
from vitray.models.checkpoint import hash_weights, locate
from vitray.models.linear_head import Head, read_head, write_head
from vitray.operations.planning import status
from vitray.operations.relabelling import relabel
from vitray.schema import ModelOutputs
from vitray.storage import join, store_for

NAMES = ("ant", "bee", "cow", "doe")
IMAGES = 14


def make_head(
    folder: Path,
    model: str,
    layer: int | None = None,
    pool: str = "cls",
    normalize: bool = False,
    **more: object,
) -> str:
    """A head of random numbers for the model's embeddings [32], whose scores tell images apart."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(len(NAMES), 32)).astype(np.float32) * (8 if normalize else 1.5)
    head = Head(
        NAMES,
        weight,
        rng.normal(size=len(NAMES)).astype(np.float32),
        layer,
        pool,
        normalize,
        model,
        "",
    )
    folder.mkdir()
    write_head(
        str(folder), replace(head, **{"weights_sha256": hash_weights(locate(model, None)), **more})
    )
    return str(folder)


def expected_scores(vectors: np.ndarray, head: Head) -> np.ndarray:
    logits = vectors.astype(np.float64) @ head.weight.T + head.bias
    chances = np.exp(logits - logits.max(1, keepdims=True))
    return chances / chances.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("vit"), "vit", True)


READS = [(None, "cls", False), (None, "mean", True), (2, "cls", True), (1, "patches_mean", False)]


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


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_other_engines_give_the_same_scores(vit: str, tmp_path: Path, engine: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(engine, engine))
    url = make_head(tmp_path / "head", vit, 2, "mean", True)
    exact = by_label(run(job_for(vit, head=url), noise(IMAGES)))
    np.testing.assert_allclose(
        by_label(run(job_for(vit, head=url, engine=engine), noise(IMAGES))), exact, atol=1e-4
    )


@pytest.mark.nightly
def test_a_compiled_pass_gives_the_same_scores(vit: str, tmp_path: Path) -> None:
    job = job_for(vit, head=make_head(tmp_path / "head", vit, 2, "mean", True), batch_size=1)
    spec = identify(job)
    model = open_model(
        spec, ModelOutputs(tuple(vector_columns(job, spec)), 5), "cpu", 1, compiled=True
    )
    np.testing.assert_allclose(
        by_label(model.predict(noise(3))), by_label(run(job, noise(3))), atol=1e-4
    )


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
        ({"labels": ["a", "b", "c", "a"]}, "label a is there twice"),
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


# ---------------------------------------------------------------- datasets


@pytest.fixture
def job(vit: str, tmp_path: Path) -> Job:
    """Over two shards of pictures, one of them broken; two embeddings."""
    (tmp_path / "in").mkdir()
    for n, image in enumerate(noise(IMAGES)):
        Image.fromarray(image).save(tmp_path / "in" / f"{n:02d}.png")
    (tmp_path / "in" / "05x.png").write_bytes(b"no picture")
    vectors = [
        {"name": "raw"},
        {"layer": 2, "pool": "mean", "normalize": True, "dtype": "float16", "name": "half"},
    ]
    fields = {
        "engine": "torch",
        "device": "cpu",
        "precision": "fp32",
        "group_size": 8,
        "max_error_rate": 1,
        "top_k": 3,
    }
    return Job(
        source=f"{tmp_path}/in", model=vit, out=f"{tmp_path}/out", embeddings=vectors, **fields
    )


@pytest.mark.parametrize(
    ("reads", "column", "close"), [(READS[0], "raw", 1e-4), ((2, "mean", True), "half", 1e-2)]
)
def test_a_dataset_relabelled_equals_a_run_with_the_head(
    job: Job,
    vit: str,
    tmp_path: Path,
    reads: tuple[int | None, str, bool],
    column: str,
    close: float,
) -> None:
    head, into = make_head(tmp_path / "head", vit, *reads), f"{tmp_path}/into"
    vitray.run(job)
    ran = job.model_copy(update={"head": head, "out": f"{tmp_path}/ran"})
    vitray.run(ran)
    result = relabel(job.out, head, into)
    assert (result.column, result.shards, result.written, result.rows, result.errors) == (
        f"embedding_{column}",
        2,
        2,
        IMAGES,
        1,
    )
    old, new, expected = (vitray.read(out) for out in (job.out, into, ran.out))
    labels = ["label", "label_id", "score", "top_labels", "top_ids", "top_scores"]
    assert new.drop_columns(labels).equals(old.drop_columns(labels))
    assert new.schema.equals(expected.schema)
    np.testing.assert_allclose(new["score"], expected["score"], atol=close)
    chances = np.array(expected["top_scores"].to_pylist())
    clear = chances[:, 0] - chances[:, 1] > 2 * close
    assert (
        clear.sum() >= IMAGES // 2
        and pc.all(pc.equal(new["label"], expected["label"]).filter(clear)).as_py()
    )
    assert [len(row) for row in new["top_labels"].to_pylist()] == [3] * IMAGES and set(
        new["label"].to_pylist()
    ) <= set(NAMES)

    checked = vitray.validate(into, content=True)
    assert (checked.problems, checked.rows, checked.errors, checked.pending) == ((), IMAGES, 1, 0)
    assert status(into).complete
    assert (
        f"head       {head} (sha256 {read_head(head).sha256()[:12]}…), over the stored "
        f"{result.column}\n" in str(status(into))
    )
    assert (
        compare(into, ran.out).rows == IMAGES
        and (compare(into, ran.out).agreement or 0) >= clear.mean()
    )
    report(into, f"{tmp_path}/page.html", None, False)
    assert new["label"][0].as_py() in Path(f"{tmp_path}/page.html").read_text()
    assert (
        f"`{read_head(head).sha256()}`, over the stored `{result.column}`"
        in Path(write_card(into)).read_text()
    )
    assert relabel(job.out, head, into).written == 0
    with pytest.raises(
        FingerprintError, match="head differs"
    ):  # a run's labels are of the pass itself
        vitray.run(ran.model_copy(update={"out": into}))


def test_a_dataset_that_has_no_labels_gets_some_and_goes_on_after_a_kill(
    job: Job, vit: str, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlabelled = job.model_copy(update={"labels": False})
    vitray.run(unlabelled)
    bucket = new_bucket(mock_s3, monkeypatch)
    local, head, into = (
        make_head(tmp_path / "head", vit),
        join(bucket, "head"),
        join(bucket, "into"),
    )
    for name in ("head.json", "head.safetensors"):
        store_for(head).create(join(head, name), Path(local, name).read_bytes())
    assert relabel(unlabelled.out, head, into).written == 2
    rows = vitray.read(into)
    shard = rows["shard"][0].as_py()
    store_for(into).delete([join(into, "_SUCCESS.json"), join(into, "data", f"{shard}.parquet")])
    assert relabel(unlabelled.out, head, into).written == 1
    assert vitray.read(into).equals(rows) and vitray.validate(into).ok
    scores = expected_scores(np.stack(rows["embedding_raw"].to_pylist()), read_head(head))
    assert rows["label_id"].to_pylist() == scores.argmax(1).tolist()


def test_a_shard_that_was_redone_is_relabelled_again(job: Job, vit: str, tmp_path: Path) -> None:
    vitray.run(job)
    head, into = make_head(tmp_path / "head", vit), f"{tmp_path}/into"
    assert relabel(job.out, head, into).errors == 1
    dataset = open_dataset(job.out)
    assert dataset is not None
    forget(dataset, shards_to_redo(dataset, [], ["not_an_image"]))
    Image.fromarray(noise(1, seed=9)[0]).save(bad := tmp_path / "again.png")
    status = (tmp_path / "in" / "05x.png").stat()
    data = bad.read_bytes()
    (tmp_path / "in" / "05x.png").write_bytes(data[: status.st_size])
    os.utime(
        tmp_path / "in" / "05x.png", ns=(status.st_atime_ns, status.st_mtime_ns)
    )  # the same shard, other bytes
    vitray.run(job)
    assert relabel(job.out, head, into).written == 1 and relabel(job.out, head, into).written == 0
    reasons = vitray.validate(into, content=True)
    assert reasons.ok
    old, new = (pq.read_table(sorted(Path(out, "_errors").iterdir())[0]) for out in (job.out, into))
    assert old.equals(new)


def test_what_cannot_be_relabelled_is_refused_and_writes_nothing(
    job: Job, vit: str, tmp_path: Path
) -> None:
    vitray.run(job)
    head, into = make_head(tmp_path / "head", vit, None, "mean"), f"{tmp_path}/into"
    with pytest.raises(JobError) as raised:
        relabel(job.out, head, into)
    assert "reads layer last, pool mean, normalize false" in str(raised.value)
    assert (
        "embedding_raw: layer last, pool cls, normalize false; embedding_half: layer 2, pool mean"
        in str(raised.value)
    )
    foreign = make_head(tmp_path / "foreign", vit, weights_sha256="5" * 64)
    with pytest.raises(ModelError, match=r"weights 555555555555…\), and the embeddings are of"):
        relabel(job.out, foreign, into)
    good = make_head(tmp_path / "good", vit)
    for path, what in ((job.out, "the dataset"), (f"{tmp_path}/in", f"its source {tmp_path}/in")):
        with pytest.raises(JobError, match=f"lies inside {what}: choose another path"):
            relabel(job.out, good, f"{path}/into")
    with pytest.raises(JobError, match="holds no vitray dataset"):
        relabel(f"{tmp_path}/nothing", head, into)
    assert not Path(into).exists()
    assert not Path(tmp_path, "in", "into").exists()
    relabel(job.out, good, into)
    with pytest.raises(FingerprintError, match="head differs"):
        relabel(job.out, make_head(tmp_path / "next", vit, bias=np.ones(4, np.float32)), into)


def test_the_command_says_what_it_did_and_a_run_takes_the_head_as_a_field(
    job: Job, vit: str, tmp_path: Path
) -> None:
    head = make_head(tmp_path / "head", vit)
    vitray.run(job.model_copy(update={"head": head}))
    dataset = open_dataset(job.out)
    assert dataset is not None and (dataset.spec.head, dataset.spec.labels) == (head, NAMES)
    argv = [
        sys.executable,
        "-m",
        "vitray",
        "relabel",
        job.out,
        "--head",
        head,
        "--into",
        f"{tmp_path}/into",
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout
        == f"{tmp_path}/into: 2 shards relabelled by embedding_raw, 2 of them now, 14 rows, 1 "
        f"error\n"
    )
    assert not {"torch", "transformers"} & set(_modules_of(argv[3:]))
    write_head(head, replace(read_head(head), bias=np.ones(4, np.float32)))
    with pytest.raises(FingerprintError, match="head differs"):
        vitray.run(job.model_copy(update={"head": head}))


def _modules_of(arguments: list[str]) -> list[str]:
    code = (
        f"import sys\nsys.argv = ['vitray', *{arguments!r}]\nfrom vitray.cli import main\ntry:\n   "
        f" main()\nexcept SystemExit:\n    print('\\n', *sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    ).stdout.split()
