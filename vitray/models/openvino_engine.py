"""The OpenVINO engine: a graph compiled for this CPU, in bf16 or fp32 where it is not quantised.
Imported only when it is opened.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from vitray.errors import ModelError
from vitray.models.graph import Run, without_warnings

# OpenVINO and NNCF report their use, and write an id into the home directory, without being asked;
# without this module they cannot
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None bars an import: see importlib
import openvino  # noqa: E402

HINTS = {"bf16": "bf16", "fp32": "f32"}


def convert(exported: Any) -> Any:
    """An ExportedProgram as an openvino.Model."""
    with without_warnings():
        return openvino.convert_model(exported)


def save(graph: Any, file: str, half: bool) -> None:
    """The graph as FILE.xml and FILE.bin. half: float32 weights stored as float16, computed as
    before.
    """
    openvino.save_model(graph, file, compress_to_fp16=half)


def open_graph(graph: Any, precision: str, threads: int) -> Run:
    """What runs a graph, or that of an .xml file, for `threads` callers at once.

    Raises ModelError when this CPU cannot compute in `precision`.
    """
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": max(1, threads),
        "NUM_STREAMS": max(1, threads),  # a thread a batch: see torch_engine.py
        "ENABLE_CPU_PINNING": False,  # decoders work beside it on the same cores
    }
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != HINTS[precision]:
        raise ModelError(
            f"OpenVINO computes in {taken} and not in {precision} on this CPU. Set precision: "
            f"fp32, or engine: torch."
        )
    here = threading.local()

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        if not hasattr(here, "request"):
            here.request = compiled.create_infer_request()
        return [
            np.array(values) for values in here.request.infer([pixels]).values()
        ]  # the request's own are written again

    return run
