"""A checkpoint's forward pass as files of other formats, quantised if asked. Each function below
writes one format; none judges.

All but Core ML take the one ExportedProgram of models/graph.py. What libraries print on the way is
not shown.
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
from vitray.schema import ModelSpec, VectorColumn

QUANTISED = ("fp16", "int8", "int8-weights", "int4-weights")
KNOWN = {"onnx": QUANTISED, "openvino": QUANTISED, "torch-export": (), "coreml": ("fp16",)}
LACKS = {
    "torch-export": "torch's own int8 (torchao) wants a GPU, and fp16 is a precision of the job. "
    "Use "
    "--to "
    "onnx or openvino",
    "coreml": "coremltools cannot be judged here, where Core ML does not run. Use --fp16, or --to "
    "onnx "
    "or openvino",
}
EXTRAS = {"onnxruntime": "onnx", "onnx": "onnx", "onnxscript": "onnx", "openvino": "openvino"}
EXTRAS |= {"nncf": "quantise", "coremltools": "coreml"}
MODULES = {
    "onnx": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
    "coreml": ("coremltools",),
}
MATRICES = [
    "MatMul",
    "Gemm",
    "Conv",
]  # softmax, norms and GELU stay float32: they are little work, and lose most
GROUP = 32  # weights that share a scale in int4
BATCH = 10  # calibration images at a time
COPIES = 3  # of the weights that lie on the disk at a time, at most


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported. labels: with the scores of all of them. vectors: raw ones, see exported.py.
    calibration: uint8 [N, H, W, 3].
    """

    found: Checkpoint
    spec: ModelSpec
    labels: bool
    vectors: list[VectorColumn]
    calibration: np.ndarray

    @property
    def names(self) -> list[str]:
        """Of the graph's results, in their order."""
        return ["scores"] * self.labels + [f"{v.pool}_{v.layer or 'last'}" for v in self.vectors]

    def program(self, fixed: Any = None) -> Any:
        from vitray.models.graph import export_graph
        from vitray.models.linear import open_head
        from vitray.models.loading import load_network

        head = open_head(self.spec, self.found, "cpu") if self.labels else None
        network = load_network(self.found, self.labels, head)
        return export_graph(network, self.spec, self.vectors, self.labels, fixed)


def require(to: str, how: str) -> None:
    """Raises JobError for a format or a quantisation that is not known, or whose library is not
    installed.
    """
    if to not in KNOWN:
        raise JobError(f"--to {to}: choose one of {', '.join(KNOWN)}.")
    if how and how not in KNOWN[to]:
        raise JobError(f"--to {to} has no --{how}: {LACKS[to]}.")
    needed = (
        *MODULES.get(to, ()),
        *(("nncf",) if to == "openvino" and how.startswith("int") else ()),
    )
    if missing := next((module for module in needed if find_spec(module) is None), None):
        raise JobError(
            f"--to {to}{how and f' --{how}'} needs {missing}: pip install "
            f"'vitray[{EXTRAS[missing]}]'."
        )


def write(source: Source, to: str, how: str, folder: Path) -> None:
    """The graph's files into the folder. Raises ModelError when the library refuses the model."""
    needed, free = (
        COPIES * sum(map(os.path.getsize, weight_files(source.found))),
        shutil.disk_usage(folder).free,
    )
    if free < needed:
        megabytes = f"{needed / 1e6:.1f} MB for a while, and {free / 1e6:.1f} MB are free"
        raise StorageError(
            f"{folder.parent}: an export may take {megabytes}. Make room, or choose another --into."
        )
    try:
        with _silence():
            WRITERS[to](source, how, folder)
    except (OSError, ModelError):
        raise
    except Exception as error:  # each library has its own kinds for what it does not know
        if "iostream error" in str(error):  # what C++ says of a disk that takes no more
            raise OSError(one_line(error)) from error
        said = f"{type(error).__name__}, {one_line(error)}"
        raise ModelError(
            f"{source.spec.model} cannot be exported by --to {to}{how and f' --{how}'} ({said})."
        ) from error


def run_program(source: Source) -> Model:
    """What a torch-export says, without a file: reading one back may run code."""
    import torch

    from vitray.models.graph import GraphModel

    module = source.program().module()

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [result.numpy() for result in module(torch.from_numpy(pixels))]

    return GraphModel(run, source.spec, source.vectors, len(source.spec.labels), 1)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Libraries tell of their progress on both streams, and warn of each other's versions; what
    they raise still comes through.
    """
    before = logging.root.manager.disable
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
        logging.disable(before)


def _onnx(source: Source, how: str, folder: Path) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from vitray.models.onnx_engine import write_graph

    file, plain = str(folder / "model.onnx"), str(folder / "plain.onnx")
    write_graph(source.program(), file, source.names)
    if how and os.path.exists(f"{file}.data"):
        raise ModelError("ONNX Runtime's quantiser takes models of up to 2 GB; use --to openvino")
    if how == "int8":
        quant_pre_process(file, plain, skip_symbolic_shape=True)
        kinds = {
            "quant_format": QuantFormat.QDQ,
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QInt8,
        }
        extremes = {"per_channel": True, "calibrate_method": CalibrationMethod.MinMax}
        quantize_static(
            plain,
            file,
            _Reader(source.calibration),
            op_types_to_quantize=MATRICES,
            **kinds,
            **extremes,
        )
        os.unlink(plain)
    elif how == "fp16":
        onnx.save(convert_float_to_float16(onnx.load(file), keep_io_types=True), file)
    elif how:
        quantiser = MatMulNBitsQuantizer(
            onnx.load(file), bits=int(how[3]), block_size=GROUP, is_symmetric=True
        )
        quantiser.process()
        onnx.save(quantiser.model.model, file)
    if not os.path.exists(f"{file}.data"):
        onnx.save(_without_notes(onnx.load(file)), file)


class _Reader:
    """onnxruntime's CalibrationDataReader, by its shape."""

    def __init__(self, images: np.ndarray) -> None:
        self._batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(({"pixels": batch} for batch in self._batches), None)


def _without_notes(graph: Any) -> Any:
    """Without the exporter's notes at each node (a third of a tiny model's file), some of which
    name paths of this machine.
    """
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for value in (
        *graph.graph.value_info,
        *graph.graph.input,
        *graph.graph.output,
        *graph.graph.initializer,
    ):
        del value.metadata_props[:]
    del graph.graph.value_info[:], graph.graph.metadata_props[:], graph.metadata_props[:]
    return graph


def _openvino(source: Source, how: str, folder: Path) -> None:
    from vitray.models import openvino_engine  # first: it bars the telemetry that NNCF uses, too

    graph = openvino_engine.convert(source.program())
    for output, name in zip(graph.outputs, source.names):
        output.set_names({name})
    if how.startswith("int"):
        graph = _by_nncf(graph, how, source.calibration)
    openvino_engine.save(graph, str(folder / "openvino_model.xml"), half=how == "fp16")


def _by_nncf(graph: Any, how: str, calibration: np.ndarray) -> Any:
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    if how != "int8":
        mode = {
            "int8-weights": nncf.CompressWeightsMode.INT8_SYM,
            "int4-weights": nncf.CompressWeightsMode.INT4_SYM,
        }[how]
        return nncf.compress_weights(
            graph, mode=mode, group_size=GROUP if how == "int4-weights" else None
        )
    return nncf.quantize(
        graph,
        nncf.Dataset([image[None] for image in calibration]),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            # by default the mean of the images' ranges, which cuts off every second one: least
            # cosine 0.87 on drawn shapes, not 0.998
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
        ),
    )


def _torch_export(source: Source, how: str, folder: Path) -> None:
    """model.pt2 for others; a copy of the weights beside it is what vitray opens: see
    SECURITY.md.
    """
    import torch

    program, archive = (
        source.program(),
        io.BytesIO(),
    )  # torch's own writer ends the process when the disk is full
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    torch.export.save(program, archive)
    (folder / "model.pt2").write_bytes(archive.getbuffer())
    for path in weight_files(source.found):
        shutil.copy(path, folder)
    index = os.path.join(source.found.directory, "model.safetensors.index.json")
    if os.path.isfile(index):
        shutil.copy(index, folder)


def _coreml(source: Source, how: str, folder: Path) -> None:
    """One image at a time, pixels as int32, which is the smallest type that Core ML takes for a
    tensor of whole numbers.
    """
    import coremltools as ct
    import torch

    one = torch.zeros(1, *source.spec.pixels.shape, 3, dtype=torch.int32)
    model = ct.convert(
        source.program(one).run_decompositions({}),
        outputs=[ct.TensorType(name=name) for name in source.names],
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT16 if how == "fp16" else ct.precision.FLOAT32,
        skip_model_load=True,
    )
    said = model.get_spec().description
    shapes = [tuple(field.type.multiArrayType.shape) for field in (*said.input, *said.output)]
    sizes = [len(source.spec.labels)] * source.labels + [
        vector.dimension for vector in source.vectors
    ]
    if (
        shapes != [tuple(one.shape), *((1, size) for size in sizes)]
        or [field.name for field in said.output] != source.names
    ):
        raise ModelError(f"coremltools made a graph of {shapes}")
    model.save(str(folder / "model.mlpackage"))


Write = Callable[[Source, str, Path], None]
WRITERS: dict[str, Write] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch-export": _torch_export,
    "coreml": _coreml,
}
