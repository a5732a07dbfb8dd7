"""A checkpoint's forward pass as files of other formats, quantised if asked.

Each writer below writes one format, and compares nothing. All formats but Core ML start from the
ExportedProgram of models/graph.py. What the libraries print is not shown.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vitray.errors import JobError, ModelError, StorageError, one_line
from vitray.models import Model
from vitray.models.checkpoint import Checkpoint, weight_files
from vitray.schema import ModelOutputs, ModelSpec, VectorColumn

QUANTISED = ("fp16", "int8", "int8-weights", "int4-weights")
KNOWN = {"onnx": QUANTISED, "openvino": QUANTISED, "torch-export": (), "coreml": ("fp16",)}
WHY_NOT = {
    "torch-export": (
        "torch's own int8 (torchao) needs a GPU, and fp16 is a precision of the job. Use --to onnx "
        "or openvino"
    ),
    "coreml": (
        "Core ML does not run here, so its error cannot be measured. Use --fp16, or --to onnx or "
        "openvino"
    ),
}
EXTRAS = {
    "onnxruntime": "onnx",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "nncf": "quantise",
    "coremltools": "coreml",
}
MODULES = {
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "coreml": ("coremltools",),
}
# the rest stays float32: softmax, norms and GELU are little work, and lose the most
QUANTISED_OPERATORS = ["MatMul", "Gemm", "Conv"]
GROUP = 32  # weights that share a scale in int4
BATCH = 10  # calibration images at a time
COPIES = 3  # of the weights on the disk at a time, at most


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported.

    labels: whether the graph gives scores, of all labels. vectors: raw ones, as in exported.py.
    calibration: uint8 [N, H, W, 3].
    """

    original: Checkpoint
    spec: ModelSpec
    labels: bool
    vectors: list[VectorColumn]
    calibration: np.ndarray

    @property
    def outputs(self) -> ModelOutputs:
        """All labels if there are scores, and the vectors."""
        labels = len(self.spec.labels) if self.labels else 0
        return ModelOutputs(tuple(self.vectors), labels)

    @property
    def names(self) -> list[str]:
        """The names of the graph's results, in their order."""
        vectors = [f"{vector.pool}_{vector.layer or 'last'}" for vector in self.vectors]
        return ["scores", *vectors] if self.labels else vectors

    def program(self, fixed: Any = None) -> Any:
        """The forward pass as an ExportedProgram. fixed: pixels of the only shape it takes."""
        from vitray.models.forward import open_head
        from vitray.models.graph import export_graph
        from vitray.models.loading import load_network

        head = open_head(self.spec, self.original, "cpu") if self.labels else None
        network = load_network(self.original, self.labels, head)
        return export_graph(network, self.spec, self.outputs, fixed)


def require(to: str, quantisation: str) -> None:
    """Raises JobError for an unknown format or quantisation, or if its library is not installed."""
    if to not in KNOWN:
        raise JobError(f"--to {to}: choose one of {', '.join(KNOWN)}.")
    if quantisation and quantisation not in KNOWN[to]:
        raise JobError(f"--to {to} has no --{quantisation}: {WHY_NOT[to]}.")
    nncf = ("nncf",) if to == "openvino" and quantisation.startswith("int") else ()
    needed = (*MODULES.get(to, ()), *nncf)
    if missing := next((module for module in needed if find_spec(module) is None), None):
        extra = EXTRAS[missing]
        raise JobError(
            f"{_options(to, quantisation)} needs {missing}: pip install 'vitray[{extra}]'."
        )


def _options(to: str, quantisation: str) -> str:
    return f"--to {to} --{quantisation}" if quantisation else f"--to {to}"


def write(source: Source, to: str, quantisation: str, folder: Path) -> None:
    """Write the graph's files. Raises ModelError if the library refuses the model."""
    _require_space(source, folder)
    try:
        with _silence():
            WRITERS[to](source, quantisation, folder)
    except (OSError, ModelError):
        raise
    except Exception as error:  # each library raises its own types for models it does not support
        if "iostream error" in str(error):  # the C++ runtime's text for a full disk
            raise OSError(one_line(error)) from error
        reason = f"{type(error).__name__}, {one_line(error)}"
        raise ModelError(
            f"{source.spec.model} cannot be exported by {_options(to, quantisation)} ({reason})."
        ) from error


def _require_space(source: Source, folder: Path) -> None:
    needed = COPIES * sum(os.path.getsize(path) for path in weight_files(source.original))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder.parent}: an export may take {needed / 1e6:.1f} MB for a while, and "
            f"{free / 1e6:.1f} MB are free. Make room, or choose another --into."
        )


def run_program(source: Source) -> Model:
    """The model of a torch-export, without its file: reading one back may run code."""
    import torch

    from vitray.models.graph import GraphModel

    module = source.program().module()

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [result.numpy() for result in module(torch.from_numpy(pixels))]

    return GraphModel(run, source.spec, source.outputs, 1)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Hide what libraries print, log and warn of; what they raise is not hidden."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _onnx(source: Source, quantisation: str, folder: Path) -> None:
    import onnx

    from vitray.models.onnx_engine import write_graph

    file = str(folder / "model.onnx")
    write_graph(source.program(), file, source.names)
    if quantisation and os.path.exists(f"{file}.data"):
        raise ModelError("ONNX Runtime's quantiser takes models of up to 2 GB; use --to openvino")
    if quantisation:
        _quantise_onnx(file, quantisation, source.calibration)
    if not os.path.exists(f"{file}.data"):
        onnx.save(_without_notes(onnx.load(file)), file)


def _quantise_onnx(file: str, quantisation: str, calibration: np.ndarray) -> None:
    """Replace the graph in `file` by a quantised one."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.transformers.float16 import convert_float_to_float16

    if quantisation == "int8":
        _quantise_onnx_statically(file, calibration)
    elif quantisation == "fp16":
        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), file)
    else:
        bits = {"int8-weights": 8, "int4-weights": 4}[quantisation]
        quantiser = MatMulNBitsQuantizer(
            onnx.load(file), bits=bits, block_size=GROUP, is_symmetric=True
        )
        quantiser.process()
        onnx.save(quantiser.model.model, file)


def _quantise_onnx_statically(file: str, calibration: np.ndarray) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = f"{file}.prepared"
    quant_pre_process(file, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        file,
        _CalibrationBatches(calibration),
        op_types_to_quantize=QUANTISED_OPERATORS,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod.MinMax,
    )
    os.unlink(prepared)


class _CalibrationBatches:
    """Has the method of onnxruntime's CalibrationDataReader."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixels": batch}


def _without_notes(model: Any) -> Any:
    """The ONNX model without the exporter's notes at each node.

    They are a third of a tiny model's file, and some contain paths of this machine.
    """
    graph = model.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del value.metadata_props[:]
    del graph.value_info[:], graph.metadata_props[:], model.metadata_props[:]
    return model


def _openvino(source: Source, quantisation: str, folder: Path) -> None:
    from vitray.models import openvino_engine  # first: it disables telemetry, NNCF's too

    graph = openvino_engine.convert(source.program())
    for output, name in zip(graph.outputs, source.names):
        output.set_names({name})
    if quantisation.startswith("int"):
        graph = quantise_with_nncf(graph, quantisation, source.calibration)
    openvino_engine.save(graph, str(folder / "openvino_model.xml"), half=quantisation == "fp16")


def quantise_with_nncf(graph: Any, quantisation: str, calibration: np.ndarray) -> Any:
    """The OpenVINO graph with int8 or int4 weights; for int8, with int8 activations too."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    if quantisation == "int8-weights":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    if quantisation == "int4-weights":
        mode = nncf.CompressWeightsMode.INT4_SYM
        return nncf.compress_weights(graph, mode=mode, group_size=GROUP)
    return nncf.quantize(
        graph,
        nncf.Dataset([image[None] for image in calibration]),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # the default is the mean of the images' ranges, which cuts off every second image:
            # least cosine 0.87 on drawn shapes instead of 0.998
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        ),
    )


def _torch_export(source: Source, _quantisation: str, folder: Path) -> None:
    """model.pt2 for other programs, and a copy of the weights, which vitray opens (SECURITY.md)."""
    import torch

    program = source.program()
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    archive = io.BytesIO()  # torch's own file writer ends the process when the disk is full
    torch.export.save(program, archive)
    (folder / "model.pt2").write_bytes(archive.getbuffer())
    for path in weight_files(source.original):
        shutil.copy(path, folder)
    index = os.path.join(source.original.directory, "model.safetensors.index.json")
    if os.path.isfile(index):
        shutil.copy(index, folder)


def _coreml(source: Source, quantisation: str, folder: Path) -> None:
    """One image at a time; pixels are int32, Core ML's smallest integer type for tensors."""
    import coremltools as ct
    import torch

    image = torch.zeros(1, *source.spec.pixels.shape, 3, dtype=torch.int32)
    model = ct.convert(
        source.program(image).run_decompositions({}),
        outputs=[ct.TensorType(name=name) for name in source.names],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT16 if quantisation == "fp16" else ct.precision.FLOAT32,
        skip_model_load=True,
    )
    _require_shapes(model.get_spec().description, tuple(image.shape), source)
    model.save(str(folder / "model.mlpackage"))


def _require_shapes(description: Any, pixels: tuple[int, ...], source: Source) -> None:
    """Raises ModelError if coremltools changed the names of the results, or any shape."""
    labels = [len(source.spec.labels)] if source.labels else []
    sizes = [*labels, *(vector.dimension for vector in source.vectors)]
    fields = (*description.input, *description.output)
    shapes = [tuple(field.type.multiArrayType.shape) for field in fields]
    names = [field.name for field in description.output]
    if shapes != [pixels, *((1, size) for size in sizes)] or names != source.names:
        raise ModelError(f"coremltools made a graph of {shapes}")


Writer = Callable[[Source, str, Path], None]
WRITERS: dict[str, Writer] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "coreml": _coreml,
}
