"""Engines: each keeps the same contract behind the one seam, and `auto` takes the fastest of those
that do.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from factories.small_models import CLASSES, job_for, make_checkpoint, open_job
from vitray.errors import ModelError
from vitray.job import Embedding
from vitray.models import Model, Predictions, engines, identify, open_model, vector_columns
from vitray.schema import ModelOutputs

pytestmark = pytest.mark.usefixtures("two_threads")

ENGINES = ("torch", "openvino", "onnx")
OTHERS = ENGINES[1:]


@pytest.mark.parametrize("engine", OTHERS)
def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True), engine=engine)
    spec = identify(job)
    monkeypatch.setitem(sys.modules, engines.MODULES[engine][0], None)
    for act in (lambda: identify(job), lambda: open_job(job, spec)):
        with pytest.raises(
            ModelError,
            match=rf"engine {engine} is not installed here\. Install it \(pip install 'vitray\[{engine}\]'\)",
        ):
            act()


def test_precisions_and_devices_that_an_engine_has_not_are_refused(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "vit", True)
    assert identify(job_for(directory, engine="onnx", precision="auto")).precision == "fp32"
    with pytest.raises(
        ModelError, match=r"engine onnx computes in fp32, not in bf16\. Set precision: fp32"
    ):
        identify(job_for(directory, engine="onnx", precision="bf16"))
    with pytest.raises(ModelError, match="engine openvino computes in bf16 or fp32, not in fp16"):
        identify(job_for(directory, engine="openvino", precision="fp16"))
    assert "runs on the CPU, and this job on cuda" in str(
        engines.engine_refusal("openvino", "cuda", "bf16")
    )
    assert (
        engines.usable_engines("cuda", "bf16")[0]
        == engines.usable_engines("cpu", "fp16")[0]
        == ["torch"]
    )
    assert engines.usable_engines("cpu", "bf16") == (
        ["torch", "openvino"],
        "onnx left out (computes in fp32, not in bf16)",
    )
    assert engines.usable_engines("cpu", "fp32") == (list(ENGINES), "")


@pytest.mark.parametrize("engine", OTHERS)
def test_an_engine_that_is_installed_and_broken_is_named(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its module is found, and to import it raises what a library that is missing raises."""
    job = job_for(make_checkpoint(tmp_path, "vit", True), engine=engine)
    name = engines.MODULES[engine][0]
    (tmp_path / "broken" / name).mkdir(parents=True)
    (tmp_path / "broken" / name / "__init__.py").write_text(
        'raise ImportError("libx.so.1: cannot open shared object file")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    for module in [
        m for m in sys.modules if m.split(".")[0] == name or m == f"vitray.models.{engine}_engine"
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(
        ModelError,
        match=rf"engine {engine} is installed, but cannot be loaded \(libx.so.1: .*engine: torch",
    ):
        identify(job)


@dataclasses.dataclass
class Fake:
    """An engine that says what another one says, but late, or with other labels, or turned
    vectors.
    """

    model: Model
    delay_s: float = 0.0
    shift: int = 0
    turn: float = 0.0
    calls: int = 0

    def predict(self, pixels: np.ndarray) -> Predictions:
        self.calls += 1
        time.sleep(self.delay_s)
        found = self.model.predict(pixels)
        turned = {name: v + self.turn * np.roll(v, 1, axis=1) for name, v in found.vectors.items()}
        return Predictions((found.ids + self.shift) % CLASSES, found.scores, turned)


def test_auto_takes_the_fastest_engine_and_none_that_strays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True), embeddings=[Embedding()], batch_size=4)
    spec = identify(job)
    torch_model = open_job(job, spec)
    all_labels = open_model(spec, ModelOutputs(tuple(vector_columns(job, spec)), CLASSES), "cpu", 2)
    liar, turned = Fake(torch_model, shift=1), Fake(torch_model, turn=0.1)
    slow, slower = Fake(torch_model, 0.05), Fake(torch_model, 0.1)

    def broken() -> Model:
        raise RuntimeError("no kernel\nfor this")

    choices = {
        "torch": lambda: slower,
        "a": lambda: slow,
        "b": lambda: liar,
        "c": lambda: turned,
        "d": broken,
    }
    engine, why = engines.fastest(spec, choices, lambda: all_labels)
    assert engine == "a" and liar.calls == turned.calls == 1
    parts = why.split(", ")
    assert (
        parts[0].startswith("torch ")
        and parts[0].endswith(" images/s")
        and parts[1].endswith(" images/s")
    )
    assert parts[2] == "b left out (another label than torch in fp32 for 16 of 16 images)"
    assert (
        parts[3].startswith("c left out (cosine 0.9")
        and parts[4] == "d left out (no kernel for this)"
    )
    assert (
        engines.fastest(spec, {"torch": lambda: slow, "a": lambda: slower}, lambda: all_labels)[0]
        == "torch"
    )
    monkeypatch.setattr(
        engines, "measure_speeds", lambda models, pixels, seconds: {"torch": 100.0, "a": 109.0}
    )
    assert (
        engines.fastest(spec, {"torch": lambda: slow, "a": lambda: slow}, lambda: all_labels)[0]
        == "torch"
    )  # not by noise
    monkeypatch.undo()
    quick, late = Fake(torch_model), Fake(torch_model, delay_s=0.3)
    started = time.monotonic()
    engines.fastest(
        spec, {"torch": lambda: quick, "a": lambda: late}, lambda: all_labels, seconds=0.5
    )
    assert time.monotonic() - started < 3, "ten rounds of the late one"


@pytest.mark.parametrize(
    ("images", "flop", "pays"),
    [
        (1_999, engines.VIT_B_FLOP, False),
        (2_000, engines.VIT_B_FLOP, True),
        (2_000, 10 * engines.VIT_B_FLOP, True),
        (1_000, 10 * engines.VIT_B_FLOP, False),
        (
            10_000,
            engines.VIT_B_FLOP / 10,
            False,
        ),  # a tiny model labels them sooner than engines are timed
        (20_000, engines.VIT_B_FLOP / 10, True),
    ],
)
def test_engines_are_timed_for_much_work_only(images: int, flop: float, pays: bool) -> None:
    assert engines.timing_pays(images, flop) is pays


def test_auto_is_torch_for_few_images(tmp_path: Path) -> None:
    job = job_for(make_checkpoint(tmp_path, "vit", True), engine="auto")
    timed = list[str]()
    spec = identify(job, images=100, before_timing=lambda: timed.append("timed"))
    assert (spec.engine, timed) == ("torch", [])
    assert spec.engine_why == "too few images to time other engines: about 100"
