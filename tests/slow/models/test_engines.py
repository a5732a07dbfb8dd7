"""Engines: each keeps the same contract behind the one seam, and `auto` takes the fastest of those
that do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench_model import make_model
from factories import hand_made
from factories.small_models import (
    CLASSES,
    STEM,
    every_vector,
    job_for,
    make_checkpoint,
    noise,
    open_job,
    plain_loop,
    require_plain,
    run,
)
from support.paths import TESTS
from vitray.errors import ModelError
from vitray.job import Embedding
from vitray.models import Model, engines, identify, machine
from vitray.operations import demo_model

pytestmark = pytest.mark.usefixtures("two_threads")

ENGINES = ("torch", "openvino", "onnx")
OTHERS = ENGINES[1:]

CASES = [(name, True, False) for name in STEM] + [("vit", False, False), ("siglip", False, False)]
CASES += [
    ("vit", True, True),
    ("deit", True, True),
    ("clip", False, True),
]  # lean: the last block for CLS alone
VARIANTS = (
    "distilled",
    "beit_mean",
    "dinov2_with_registers",
)  # graphs that hardly differ from another's: 4 s each
PAIRS = [
    pytest.param(
        engine,
        *case,
        marks=[pytest.mark.nightly]
        if engine in OTHERS and (case[0] in VARIANTS or case[1:] == (True, True))
        else [],
    )
    for engine in ENGINES
    for case in CASES
]


@pytest.mark.parametrize(("engine", "name", "headed", "lean"), PAIRS)
def test_an_engine_says_what_plain_transformers_says(
    tmp_path: Path, engine: str, name: str, headed: bool, lean: bool
) -> None:
    directory, pixels = make_checkpoint(tmp_path / "m", name, headed), noise(5)
    embeddings = [Embedding()] if lean else every_vector(name != "siglip")
    job = job_for(directory, headed, embeddings, top_k=3, batch_size=4, engine=engine)
    assert (identify(job).engine, identify(job).precision) == (engine, "fp32")
    require_plain(run(job, pixels), job, name, pixels, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("weight", "column"), [("classifier.weight", "score"), ("vit.layernorm.weight", "embedding")]
)
def test_what_is_not_finite_raises_instead_of_being_stored(
    tmp_path: Path, engine: str, weight: str, column: str
) -> None:
    directory = make_checkpoint(tmp_path, "vit", True, layers=1)
    model = transformers.ViTForImageClassification.from_pretrained(directory)
    torch.nn.init.constant_(model.get_parameter(weight), float("nan"))
    model.save_pretrained(directory)
    labels = column == "score"
    if not labels:
        model.vit.save_pretrained(directory)
    with pytest.raises(ModelError, match=f"`{column}` is not finite in precision fp32"):
        run(job_for(directory, labels, [] if labels else [Embedding()], engine=engine), noise(2))


def busy_threads(model: Model, pixels: np.ndarray, seconds: float = 1.5) -> int:
    """How many of this process' threads do a fifth of the work or more."""

    def ticks() -> dict[str, int]:
        stats = {
            path.parent.name: path.read_text().rpartition(")")[2].split()
            for path in Path("/proc/self/task").glob("*/stat")
        }
        return {thread: int(stat[11]) + int(stat[12]) for thread, stat in stats.items()}

    model.predict(pixels)
    before, started = ticks(), time.monotonic()
    while time.monotonic() - started < seconds:
        model.predict(pixels)
    spent = [now - before.get(thread, 0) for thread, now in ticks().items()]
    return sum(one * 5 >= sum(spent) for one in spent)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_computes_with_the_threads_it_was_given(tmp_path: Path, engine: str) -> None:
    make_model(str(tmp_path), "vit-s", blocks=2)
    job, pixels = job_for(str(tmp_path), engine=engine, batch_size=8), noise(8, 224)
    spec = identify(job)
    assert [busy_threads(open_job(job, spec, threads), pixels) for threads in (1, 2)] == [1, 2]


def drawn(count: int) -> np.ndarray:
    rng = np.random.default_rng(99)
    return demo_model.pixels_of(
        [demo_model.draw(n % len(demo_model.NAMES), rng) for n in range(count)]
    )


def test_openvino_in_bf16_agrees_with_fp32_or_says_that_it_cannot(shapes_model: str) -> None:
    jobs = {
        p: job_for(shapes_model, embeddings=[Embedding()], precision=p, engine="openvino")
        for p in ("fp32", "bf16")
    }
    if machine.auto_precision("cpu") != "bf16":
        with pytest.raises(ModelError, match="not in bf16 on this CPU"):
            open_job(jobs["bf16"])
        return
    exact, mixed = (run(job, drawn(600)) for job in jobs.values())
    assert (mixed.ids[:, 0] == exact.ids[:, 0]).mean() >= 0.995
    a, b = exact.vectors["embedding"], mixed.vectors["embedding"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert 0.999 <= cosine.min() < 1 - 1e-7, "as exact as float32: the hint was not taken"


def test_auto_is_one_of_those_installed_and_says_how_fast_each_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True), embeddings=[Embedding()], engine="auto")
    spec = identify(job)
    assert spec.engine in ENGINES
    assert [part.split()[0] for part in spec.engine_why.split(", ")] == list(
        ENGINES
    ) and "left out" not in spec.engine_why
    for engine in OTHERS:
        monkeypatch.setitem(sys.modules, engines.MODULES[engine][0], None)
    alone = identify(job)
    assert alone.engine == "torch"
    assert alone.engine_why == ", ".join(
        f"{engine} left out (is not installed here)" for engine in OTHERS
    )


def in_fresh_python(code: str, **environment: str) -> None:
    setup = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_dataset_that_has_an_engine_keeps_it_and_no_other_is_opened(tmp_path: Path) -> None:
    job = hand_made.job_of(tmp_path)
    make_checkpoint(tmp_path / "model", "vit", True)
    hand_made.make_dataset(tmp_path, spec=identify(job))
    in_fresh_python(
        "import vitray, pathlib; from factories import hand_made\n"
        f"job = hand_made.job_of(pathlib.Path({str(tmp_path)!r}), engine='auto', "
        f"max_error_rate=1)\n"
        "assert vitray.run(job).committed == 0\n"
        "assert not {'openvino', 'onnxruntime'} & set(sys.modules)"
    )


def test_openvino_reports_its_use_to_nobody(tmp_path: Path) -> None:
    directory, home = make_checkpoint(tmp_path / "m", "vit", True), tmp_path / "home"
    home.mkdir()
    in_fresh_python(
        "from factories.small_models import *\n"
        f"run(job_for({directory!r}, engine='openvino'), noise(2))\n"
        "assert sys.modules['openvino'] and not any(sys.modules[m] for m in sys.modules if "
        "m.startswith('openvino_telemetry'))",
        HOME=str(home),
    )
    assert not list(home.glob("intel*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_any_number_of_images_any_kind_of_vector(tmp_path: Path, engine: str) -> None:
    directory = make_checkpoint(tmp_path, "vit", True, problem_type="multi_label_classification")
    vectors = [Embedding(name="plain"), Embedding(normalize=True, dtype="float16", name="unit")]
    job, pixels = (
        job_for(directory, True, vectors, top_k=CLASSES, batch_size=4, engine=engine),
        noise(17),
    )
    pixels.flags.writeable = False
    logits, tokens = plain_loop(directory, "vit", True, pixels)
    model = open_job(job)
    for count in (17, 0, 1, 2, 4, 5, 15):
        found = model.predict(pixels[:count])
        np.testing.assert_allclose(
            found.scores, logits[:count].sigmoid().topk(CLASSES)[0], rtol=1e-4, atol=1e-6
        )
        plain, unit = (found.vectors[f"embedding_{name}"] for name in ("plain", "unit"))
        np.testing.assert_allclose(plain, tokens["last"][:count, 0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=5e-4
        )
        assert (found.ids.dtype, found.scores.dtype, plain.dtype, unit.dtype) == (
            np.int32,
            np.float32,
            np.float32,
            np.float16,
        )
        assert found.ids.shape == (count, CLASSES) and unit.shape == (count, 32)
    with pytest.raises(ModelError, match=r"uint8 \[N, 32, 32, 3\], not uint8 \[2, 16, 16, 3\]"):
        model.predict(noise(2, 16))
    with pytest.raises(ModelError, match=r"not float32 \[2, 32, 32, 3\]"):
        model.predict(pixels[:2].astype(np.float32))
