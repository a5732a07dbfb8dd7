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
from vitray.totals import copied_bytes

# OpenVINO and NNCF report their use, and write an id into the home directory, without being asked.
# Without this module they cannot. None bars an import: see importlib.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
import openvino  # noqa: E402

HINTS = {"bf16": "bf16", "fp32": "f32"}


def convert(exported: Any) -> Any:
    """An ExportedProgram as an openvino.Model."""
    with without_warnings():
        return openvino.convert_model(exported)


def save(graph: Any, file: str, half: bool) -> None:
    """Write the graph as FILE.xml and FILE.bin.

    half: float32 weights are stored as float16, and computed in float32.
    """
    openvino.save_model(graph, file, compress_to_fp16=half)


def open_graph(graph: Any, precision: str, threads: int) -> Run:
    """A function that runs a graph, or that of an .xml file, for `threads` callers at once.

    Raises ModelError when this CPU cannot compute in `precision`.
    """
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": max(1, threads),
        "NUM_STREAMS": max(1, threads),  # a thread a batch: see torch_engine.py
        "ENABLE_CPU_PINNING": False,  # decoders work on the same cores
    }
    compiled = openvino.Core().compile_model(graph, "CPU", options)
    used_hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if used_hint != HINTS[precision]:
        raise ModelError(
            f"OpenVINO computes in {used_hint} and not in {precision} on this CPU. "
            "Set precision: fp32, or engine: torch."
        )
    per_thread = threading.local()

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        if not hasattr(per_thread, "request"):
            per_thread.request = compiled.create_infer_request()
            per_thread.own_input = per_thread.request.get_input_tensor()
        request = per_thread.request
        # The pixels are read where they are. The request would keep them: decoders wait for that
        # memory.
        request.set_input_tensor(_tensor(pixels))
        try:
            request.infer()
            # copies: the request overwrites its own arrays
            return [np.array(tensor.data) for tensor in request.output_tensors]
        finally:
            request.set_input_tensor(per_thread.own_input)

    return run


def _tensor(pixels: np.ndarray) -> Any:
    """The pixels as a tensor, on the same memory where OpenVINO takes it."""
    is_shared = pixels.flags.c_contiguous and pixels.flags.writeable
    if not is_shared:
        copied_bytes.add(pixels.nbytes)
    return openvino.Tensor(pixels, shared_memory=is_shared)
