"""Which engines can run a job here, and which of them `auto` is: the fastest whose answers are
those of torch in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from vitray.errors import ModelError, one_line
from vitray.models import Model, Predictions
from vitray.models.pixels import FILTERS, GPU_FILTERS
from vitray.schema import ModelSpec

MODULES = {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnx", "onnxscript")}
PRECISIONS = {"openvino": ("bf16", "fp32"), "onnx": ("fp32",)}
CLOSE = {
    "fp32": (0.99999, 1e-3),
    "bf16": (0.999, 0.05),
}  # least cosine; how far the label's score may be below the best one's
IMAGES = 16  # that every engine is checked on
ROUNDS, SECONDS = 10, 10.0  # of timing; seconds an engine, at most
AHEAD = 1.1  # of torch, which starts sooner: a graph is made anew at each start

Open = Callable[[], Model]


def refusal(engine: str, device: str, precision: str) -> str | None:
    """Why an engine cannot run this here, with what to do; None when it can."""
    if engine == "torch":
        return None
    if any(find_spec(module) is None for module in MODULES[engine]):
        return (
            f"engine {engine} is not installed here: pip install 'vitray[{engine}]', or set "
            f"engine: torch."
        )
    if device != "cpu" and not (engine == "onnx" and device == "cuda" and _onnx_computes_on_cuda()):
        return (
            f"engine {engine} runs on the CPU, and this job on {device}. Set device: cpu, or "
            f"engine: torch."
        )
    if reason := lacks(engine, precision):
        return reason
    try:
        import_module(f"vitray.models.{engine}_engine")
    except Exception as error:  # a library of the system that it lacks, say
        return (
            f"engine {engine} is installed, but cannot be loaded ({one_line(error)}). Install it "
            f"again, or set engine: torch."
        )
    return None


def lacks(engine: str, precision: str) -> str | None:
    """Why an engine does not compute in a precision, with what to do; None where it does. Loads
    nothing.
    """
    if precision == "auto" or precision in PRECISIONS.get(engine, (precision,)):
        return None
    known = " or ".join(PRECISIONS[engine])
    return (
        f"engine {engine} computes in {known}, not in {precision}. Set precision: {known}, or "
        f"engine: torch."
    )


def _onnx_computes_on_cuda() -> bool:
    """Whether the installed ONNX Runtime is one for NVIDIA's GPUs (onnxruntime-gpu)."""
    import onnxruntime

    from vitray.models import onnx_engine

    return len(onnx_engine.providers("cuda", onnxruntime.get_available_providers())) > 1


def require(engine: str, device: str, precision: str) -> None:
    """Raises ModelError when the engine cannot run this here."""
    if reason := refusal(engine, device, precision):
        raise ModelError(reason)


def require_pixels(engine: str, decode: str) -> None:
    """Raises ModelError when pixels would be on the GPU, in torch's hands, and the engine wants
    them here.
    """
    if engine != "torch" and decode in ("gpu", "hybrid"):
        raise ModelError(
            f"decode: {decode} leaves pixels to engine torch. Set decode: exact or fast, or "
            f"engine: torch."
        )


def require_filter(spec: ModelSpec, decode: str) -> None:
    """Raises ModelError when the GPU would resize, and cannot as the model's processor does."""
    if decode in ("gpu", "hybrid") and spec.pixels.resample not in GPU_FILTERS:
        raise ModelError(
            f"decode: {decode} resizes bilinear or bicubic, and {spec.model} wants "
            f"{FILTERS[spec.pixels.resample]}. "
            "Set decode: exact or fast."
        )


def usable(device: str, precision: str) -> tuple[list[str], str]:
    """The engines that can run this here, torch first; and why not the others, as `fastest` says
    it.
    """
    why = {engine: refusal(engine, device, precision) for engine in ("torch", *MODULES)}
    said = {
        name: reason.removeprefix(f"engine {name} ").partition(": pip")[0]
        for name, reason in why.items()
        if reason
    }
    out = [f"{name} left out ({reason.partition('. ')[0]})" for name, reason in said.items()]
    return [engine for engine, reason in why.items() if reason is None], ", ".join(out)


def fastest(
    spec: ModelSpec, engines: Mapping[str, Open], exact: Open, seconds: float = SECONDS
) -> tuple[str, str]:
    """The name of the fastest engine, and a line that says what each did.

    exact: opens torch in float32 with all labels. An engine that fails or strays from its answers
    is left out; torch, what the others are held against, is not checked. seconds: of timing, an
    engine.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(
        0, 256, (max(IMAGES, spec.batch_size), *spec.pixels.shape, 3), dtype=np.uint8
    )
    expected = exact().predict(pixels[:IMAGES])
    opened, said = dict[str, Model](), dict[str, str]()
    for name, open_engine in engines.items():
        try:
            model = open_engine()
            stray = (
                None if name == "torch" else strays(model.predict(pixels[:IMAGES]), expected, spec)
            )
        except Exception as error:  # an engine may not know this model: each has its own exceptions
            stray = one_line(error, 120)
        if stray is None:
            opened[name] = model
        else:
            said[name] = f"left out ({stray})"
    speeds = _speeds(opened, pixels[: spec.batch_size], seconds)
    said |= {name: f"{speed:.1f} images/s" for name, speed in speeds.items()}
    best = max(speeds, key=lambda name: speeds[name] * (AHEAD if name == "torch" else 1))
    return best, ", ".join(f"{name} {said[name]}" for name in engines)


def strays(found: Predictions, expected: Predictions, spec: ModelSpec) -> str | None:
    """How an engine's answers differ too much from those of torch in float32; None when they do
    not.

    expected: ids and scores of all labels: another label is no fault where its score is as good as
    the best one. Where no label competes with another, of one output or of regression, the scores
    themselves must agree.
    """
    least, below = CLOSE[spec.precision]
    for name, exact in expected.vectors.items():
        a, b = found.vectors[name].astype(np.float32), exact.astype(np.float32)
        cosine = float(
            ((a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))).min()
        )
        if not cosine >= least:
            return f"cosine {cosine:.5f} of {name} with torch in fp32"
    if (
        found.ids is not None
        and found.scores is not None
        and expected.ids is not None
        and expected.scores is not None
    ):
        place = (expected.ids == found.ids[:, :1]).argmax(1)
        score = np.take_along_axis(expected.scores, place[:, None], 1)[:, 0]
        if spec.regression or len(spec.labels) == 1:
            scale = float(np.abs(expected.scores).max()) if spec.regression else 1.0
            off = float(
                max(np.abs(found.scores[:, 0] - score).max(), (expected.scores[:, 0] - score).max())
            )
            return None if off <= below * scale else f"a score {off:.2g} off that of torch in fp32"
        wrong = int((score < expected.scores[:, 0] * (1 - below)).sum())
        if wrong:
            return f"another label than torch in fp32 for {wrong} of {len(score)} images"
    return None


def _speeds(models: Mapping[str, Model], pixels: np.ndarray, seconds: float) -> dict[str, float]:
    """Images/s of each, at its best: in turn, so that what else the machine does meets all of
    them.
    """
    best = dict.fromkeys(models, float("inf"))
    for model in models.values():
        model.predict(pixels)
    started = time.perf_counter()
    for _ in range(ROUNDS if len(models) > 1 else 1):
        for name, model in models.items():
            before = time.perf_counter()
            model.predict(pixels)
            best[name] = min(best[name], time.perf_counter() - before)
        if time.perf_counter() - started > seconds * len(models):
            break
    return {name: len(pixels) / took for name, took in best.items()}
