"""Which engines can run a job here, and which of them `engine: auto` chooses.

It chooses the fastest engine whose results match torch in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec

import numpy as np

from vitray.crash import crash_point
from vitray.errors import ModelError, count, one_line
from vitray.models.checkpoint import Checkpoint
from vitray.models.checkpoint_store import locate
from vitray.models.exported import hash_model, open_export, read_graph
from vitray.models.free import FREE_ENGINE, FreeModel
from vitray.models.machine import require_hardware, resolve_device
from vitray.models.pixels import FILTERS
from vitray.models.types import Model, Placement, Predictions
from vitray.schema import TORCH_FILTERS, ModelOutputs, ModelSpec
from vitray.vectors import cosines

MODULES = {"openvino": ("openvino",), "onnx": ("onnxruntime", "onnx", "onnxscript")}
PRECISIONS = {"openvino": ("bf16", "fp32"), "onnx": ("fp32",)}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How closely an engine must match torch in float32.

    cosine: the least of any embedding. score: how far the label's score may be below the best one,
    as a share of it.
    """

    cosine: float
    score: float


TOLERANCES = {"fp32": Tolerance(0.99999, 1e-3), "bf16": Tolerance(0.999, 0.05)}
IMAGES = 16  # on which every engine is checked
ROUNDS, SECONDS = 10, 10.0  # of timing; the seconds are the most for each engine
# Images of a ViT-B/16 from which on timing can pay: on two cores it takes a minute, and an image
# 130 ms, of which another engine may save a quarter.
TIMING_PAYS = 2000
VIT_B_FLOP = 35.13e9
TORCH_ADVANTAGE = 1.1  # a factor: torch starts sooner, since a graph is exported at each start

Open = Callable[[], Model]


# ---------------------------------------------------------------- opening a model


def open_model(
    spec: ModelSpec, outputs: ModelOutputs, device: str, threads: int, compiled: bool = False
) -> Model:
    """The model, loaded and ready.

    device: as in Job.device. threads: how many batches a CPU computes at once; without effect on an
    accelerator. compiled: torch compiles the forward pass first, which takes a minute; the numbers
    stay the same within the precision's tolerance (see `compiles`).

    Raises ModelError when the weights are not those of `spec`, when weights are missing, and when
    spec.engine cannot run here.
    """
    if outputs.top_k and not spec.labels:
        raise ModelError(
            f"{spec.model} was identified without labels; identify it again with labels: true"
        )
    if spec.engine == FREE_ENGINE:
        return FreeModel(spec, outputs)
    checkpoint = locate(spec.model, spec.revision)
    export = read_graph(checkpoint)
    _require_same_weights(spec, checkpoint)
    chosen = resolve_device(device)
    require_engine(spec.engine, chosen, spec.precision)
    require_hardware(chosen, spec.precision)
    placement = Placement(chosen, threads if chosen == "cpu" else 1, compiled)
    if export is not None:
        return open_export(export, spec, outputs, placement)
    return _open_checkpoint(checkpoint, spec, outputs, placement)


def _require_same_weights(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    weights = hash_model(checkpoint)
    if weights != spec.weights_sha256:
        raise ModelError(
            f"{spec.model}: the weights changed (sha256 {spec.weights_sha256[:12]}… planned, "
            f"{weights[:12]}… found). Put the old weights back, or choose another `out`."
        )


def _open_checkpoint(
    checkpoint: Checkpoint, spec: ModelSpec, outputs: ModelOutputs, placement: Placement
) -> Model:
    from vitray.models.forward import open_head
    from vitray.models.loading import load_network

    has_labels = outputs.top_k > 0
    head = open_head(spec, checkpoint, placement.device) if has_labels else None
    network = load_network(checkpoint, has_labels, head)
    crash_point("model-loaded")
    if spec.engine == "torch":
        from vitray.models.torch_engine import TorchModel

        return TorchModel(network, spec, outputs, placement)
    from vitray.models.graph import GraphModel, export_graph

    program = export_graph(network, spec, outputs)
    if spec.engine == "onnx":
        from vitray.models.onnx_engine import compile_graph

        run = compile_graph(program, placement.device)
    else:
        from vitray.models.openvino_engine import convert, open_graph

        run = open_graph(convert(program), spec.precision, placement.workers)
    return GraphModel(run, spec, outputs, placement.workers)


# ---------------------------------------------------------------- what an engine cannot do


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an engine cannot run something here, and what to do.

    reason: what is wrong, to follow the engine's name. advice: whole sentences.
    """

    engine: str
    reason: str
    advice: str

    def __str__(self) -> str:
        return f"engine {self.engine} {self.reason}. {self.advice}"


def engine_refusal(engine: str, device: str, precision: str) -> Refusal | None:
    """Why an engine cannot run this here; None when it can."""
    if engine == "torch":
        return None
    if refusal := _missing_modules(engine):
        return refusal
    if device != "cpu" and not (engine == "onnx" and device == "cuda" and _onnx_computes_on_cuda()):
        return Refusal(
            engine,
            f"runs on the CPU, and this job on {device}",
            "Set device: cpu, or engine: torch.",
        )
    if refusal := precision_refusal(engine, precision):
        return refusal
    try:
        import_module(f"vitray.models.{engine}_engine")
    except Exception as error:  # for example, a system library is missing
        return Refusal(
            engine,
            f"is installed, but cannot be loaded ({one_line(error)})",
            "Install it again, or set engine: torch.",
        )
    return None


def precision_refusal(engine: str, precision: str) -> Refusal | None:
    """Why an engine does not compute in a precision; None where it does. Imports nothing."""
    if precision == "auto" or precision in PRECISIONS.get(engine, (precision,)):
        return None
    supported = " or ".join(PRECISIONS[engine])
    return Refusal(
        engine,
        f"computes in {supported}, not in {precision}",
        f"Set precision: {supported}, or engine: torch.",
    )


def _onnx_computes_on_cuda() -> bool:
    """Whether the installed ONNX Runtime is one for NVIDIA's GPUs (onnxruntime-gpu)."""
    import onnxruntime

    from vitray.models.onnx_engine import providers

    return len(providers("cuda", onnxruntime.get_available_providers())) > 1


def require_installed(engine: str) -> None:
    """Raise ModelError for an engine whose modules are absent. Imports nothing."""
    if refusal := _missing_modules(engine):
        raise ModelError(str(refusal))


def _missing_modules(engine: str) -> Refusal | None:
    if all(find_spec(module) is not None for module in MODULES[engine]):
        return None
    return Refusal(
        engine,
        "is not installed here",
        f"Install it (pip install 'vitray[{engine}]'), or set engine: torch.",
    )


def require_engine(engine: str, device: str, precision: str) -> None:
    """Raise ModelError when the engine cannot run this here."""
    if refusal := engine_refusal(engine, device, precision):
        raise ModelError(str(refusal))


def require_precision(engine: str, precision: str) -> None:
    """Raise ModelError for an engine that does not compute in a precision. Imports nothing."""
    if refusal := precision_refusal(engine, precision):
        raise ModelError(str(refusal))


def require_pixels(engine: str, decode: str) -> None:
    """Raise ModelError when the engine cannot take pixels that torch decoded on the GPU."""
    if engine != "torch" and decode in ("gpu", "hybrid"):
        raise ModelError(
            f"decode: {decode} leaves pixels to engine torch. "
            "Set decode: exact or fast, or engine: torch."
        )


def require_filter(spec: ModelSpec, decode: str) -> None:
    """Raise ModelError when the GPU cannot resize as the model's processor does."""
    if decode in ("gpu", "hybrid") and spec.pixels.resample not in TORCH_FILTERS:
        raise ModelError(
            f"decode: {decode} resizes bilinear or bicubic, and {spec.model} needs "
            f"{FILTERS[spec.pixels.resample]}. Set decode: exact or fast."
        )


# ---------------------------------------------------------------- the fastest engine


def timing_pays(images: int, flop: float) -> bool:
    """Whether so many images can repay the timing of engines. flop: for one image."""
    return images >= TIMING_PAYS * max(1.0, VIT_B_FLOP / flop)


def usable_engines(device: str, precision: str) -> tuple[list[str], str]:
    """The engines that can run this here, torch first, and why the others cannot.

    The reasons are worded like those of `fastest`.
    """
    engines = ["torch"]
    excluded = []
    for engine in MODULES:
        refusal = engine_refusal(engine, device, precision)
        if refusal is None:
            engines.append(engine)
        else:
            excluded.append(f"{engine} left out ({refusal.reason})")
    return engines, ", ".join(excluded)


def with_fastest_engine(
    spec: ModelSpec, outputs: ModelOutputs, device: str, threads: int
) -> ModelSpec:
    """The spec with the fastest engine of this machine, and why it was chosen.

    device: as resolved. Every usable engine is opened and checked, then timed for `SECONDS`.
    """
    names, excluded = usable_engines(device, spec.precision)
    if len(names) == 1:
        return replace(spec, engine_why=excluded)

    def opening(engine: str, precision: str, top_k: int) -> Open:
        candidate = replace(spec, engine=engine, precision=precision)
        limited = replace(outputs, top_k=top_k)
        return lambda: open_model(candidate, limited, device, threads)

    choices = {name: opening(name, spec.precision, outputs.top_k) for name in names}
    engine, speeds = fastest(spec, choices, opening("torch", "fp32", len(spec.labels)))
    why = ", ".join(text for text in (speeds, excluded) if text)
    return replace(spec, engine=engine, engine_why=why)


def fastest(
    spec: ModelSpec, engines: Mapping[str, Open], exact: Open, seconds: float = SECONDS
) -> tuple[str, str]:
    """The name of the fastest engine, and a line with the result of each.

    exact: opens torch in float32 with all labels. An engine that fails or does not match it is left
    out. torch itself is the reference and is not checked. seconds: of timing, for each engine.
    """
    rng = np.random.default_rng(0)
    shape = (max(IMAGES, spec.batch_size), *spec.pixels.shape, 3)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    expected = exact().predict(pixels[:IMAGES])
    models: dict[str, Model] = {}
    results: dict[str, str] = {}
    for name, open_engine in engines.items():
        mismatch = None
        try:
            model = open_engine()
            if name != "torch":
                mismatch = describe_mismatch(model.predict(pixels[:IMAGES]), expected, spec)
        except Exception as error:  # an engine may not know this model: each has its own exceptions
            mismatch = one_line(error, 120)
        if mismatch is None:
            models[name] = model
        else:
            results[name] = f"left out ({mismatch})"
    speeds = measure_speeds(models, pixels[: spec.batch_size], seconds)
    results |= {name: f"{speed:.1f} images/s" for name, speed in speeds.items()}
    best = max(speeds, key=lambda name: speeds[name] * (TORCH_ADVANTAGE if name == "torch" else 1))
    return best, ", ".join(f"{name} {results[name]}" for name in engines)


def describe_mismatch(computed: Predictions, expected: Predictions, spec: ModelSpec) -> str | None:
    """How an engine's results differ too much from torch in float32; None when they match.

    expected: ids and scores of all labels. Another label is accepted where its score equals the
    best one. Scores themselves must match where no label competes with another: for one output
    and for regression.
    """
    tolerance = TOLERANCES[spec.precision]
    for name, exact in expected.vectors.items():
        cosine = float(cosines(computed.vectors[name], exact).min())
        if not cosine >= tolerance.cosine:
            return f"cosine {cosine:.5f} of {name} with torch in fp32"
    if computed.ids is None or computed.scores is None:
        return None
    if expected.ids is None or expected.scores is None:
        return None
    best = expected.scores[:, 0]
    position = (expected.ids == computed.ids[:, :1]).argmax(1)
    exact_score = np.take_along_axis(expected.scores, position[:, None], 1)[:, 0]
    if spec.regression or len(spec.labels) == 1:
        scale = float(np.abs(expected.scores).max()) if spec.regression else 1.0
        own_error = np.abs(computed.scores[:, 0] - exact_score).max()
        error = float(max(own_error, (best - exact_score).max()))
        if error <= tolerance.score * scale:
            return None
        return f"a score {error:.2g} off that of torch in fp32"
    wrong = int((exact_score < best * (1 - tolerance.score)).sum())
    if wrong:
        return f"another label than torch in fp32 for {wrong} of {count(len(best), 'image')}"
    return None


def measure_speeds(
    models: Mapping[str, Model], pixels: np.ndarray, seconds: float
) -> dict[str, float]:
    """The best images/s of each model; they take turns, so that other load affects all alike."""
    best = dict.fromkeys(models, float("inf"))
    for model in models.values():
        model.predict(pixels)
    deadline = time.perf_counter() + seconds * len(models)
    for _ in range(ROUNDS if len(models) > 1 else 1):
        for name, model in models.items():
            started = time.perf_counter()
            model.predict(pixels)
            best[name] = min(best[name], time.perf_counter() - started)
        if time.perf_counter() > deadline:
            break
    return {name: len(pixels) / elapsed for name, elapsed in best.items()}
