"""The ONNX Runtime engine: a graph on this CPU or GPU, in fp32 where it is not quantised.

Imported only when it is opened.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch

from vitray.models.graph import Run, without_warnings

# the first available one computes, the next ones take what it cannot do
ON_GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")
IN_MEMORY = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB


def providers(device: str, available: Sequence[str]) -> list[str]:
    """The ONNX Runtime providers for a device, best first.

    The CPU is last, for operations that no other provider knows.
    """
    on_gpu = [name for name in ON_GPU if name in available and device == "cuda"]
    return [*on_gpu, "CPUExecutionProvider"]


def write_graph(exported: Any, file: str, names: Sequence[str] | None = None) -> None:
    """Write an ExportedProgram as ONNX. names: of its results.

    Weights that are too large for protobuf go into FILE.data.
    """
    with without_warnings():
        program = torch.onnx.export(exported, dynamo=True, verbose=False, output_names=names)
    weights = sum(tensor.nbytes for tensor in exported.state_dict.values())
    program.save(file, external_data=weights > IN_MEMORY)


def open_graph(file: str, device: str) -> Run:
    """A function that runs the graph of a file; each call uses one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a thread a batch: see torch_engine.py
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        file, options, providers=providers(device, onnxruntime.get_available_providers())
    )
    (pixels_name,) = (node.name for node in session.get_inputs())

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        return list(session.run(None, {pixels_name: pixels}))

    return run


def compile_graph(exported: Any, device: str) -> Run:
    """A function that runs an ExportedProgram."""
    with tempfile.TemporaryDirectory(prefix="vitray-") as directory:
        write_graph(exported, f"{directory}/model.onnx")
        return open_graph(f"{directory}/model.onnx", device)
