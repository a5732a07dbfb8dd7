"""The ONNX Runtime engine: a graph on this CPU, in fp32. Imported only when it is opened."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import onnxruntime
import torch

from vitray.models.graph import Run


def compile_graph(exported: Any) -> Run:
    """What runs an ExportedProgram, each call on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a thread a batch: see torch_engine.py
    options.log_severity_level = 3  # errors
    with tempfile.TemporaryDirectory(prefix="vitray-") as directory:  # in memory a graph must not exceed 2 GB
        file = f"{directory}/model.onnx"
        torch.onnx.export(exported, dynamo=True, verbose=False).save(file, external_data=True)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    (pixels_name,) = (node.name for node in session.get_inputs())

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        return list(session.run(None, {pixels_name: pixels}))

    return run
