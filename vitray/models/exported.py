"""An exported model: a directory that `vitray export-model` wrote, as a `model:`.

vitray_export.json says what the directory is. config.json and the image processor's file are those
of the checkpoint. Needs no torch; the graph is data, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vitray.errors import ModelError
from vitray.models.checkpoint import (
    EXPORT,
    GRAPH_FILES,
    Checkpoint,
    VisionConfig,
    hash_weights,
    read_json,
    weight_files,
)
from vitray.models.types import Placement
from vitray.schema import ModelOutputs, ModelSpec, ScoreFunction, VectorColumn
from vitray.vectors import unit

if TYPE_CHECKING:
    from vitray.models.graph import GraphModel

FORMAT = 2
ENGINES = ("onnx", "openvino")  # vitray computes with their graphs
NEEDED = {"onnx": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}


@dataclass(frozen=True, slots=True)
class Export:
    """The contents of a vitray_export.json.

    checkpoint: its directory. to, how: the format and the quantisation.
    source: the model that it was made from. weights: sha256 of that model's safetensors.
    labels: the class names, in the order of the scores, which are the graph's first result; empty
    without scores. multi_label: the scores are independent: a sigmoid or raw values.
    vectors: (layer, pool) of the results that follow, each [n, D], float32 and not normalised.
    graph: sha256 by file.
    """

    checkpoint: Checkpoint
    to: str
    how: str
    source: str
    weights: str
    labels: tuple[str, ...]
    multi_label: bool
    vectors: tuple[tuple[int | None, str], ...]
    graph: dict[str, str]

    @property
    def model(self) -> str:
        return self.checkpoint.model

    def files(self) -> list[str]:
        return [os.path.join(self.checkpoint.directory, name) for name in sorted(self.graph)]


def read_export(checkpoint: Checkpoint) -> Export | None:
    """The export in a directory; None for a checkpoint.

    Raises ModelError for a vitray_export.json that no export wrote.
    """
    if not os.path.isfile(os.path.join(checkpoint.directory, EXPORT)):
        return None
    document = read_json(checkpoint, EXPORT)
    try:
        return _parse_export(checkpoint, document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{checkpoint.model}: {EXPORT} is not one that vitray wrote ({error}). "
            "Export the model again."
        ) from error


def _parse_export(checkpoint: Checkpoint, document: dict[str, Any]) -> Export:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}; this version reads format {FORMAT}")
    if document != seal(document):
        raise ValueError("it was changed")
    vectors = tuple(
        (None if vector["layer"] == "last" else int(vector["layer"]), str(vector["pool"]))
        for vector in document["vectors"]
    )
    target = str(document["to"])
    graph = {str(name): str(digest) for name, digest in document["graph"].items()}
    if target in ENGINES and not NEEDED[target] <= graph.keys() <= set(GRAPH_FILES):
        raise ValueError(f"graph files {', '.join(graph)}")
    return Export(
        checkpoint=checkpoint,
        to=target,
        how=str(document["quantisation"]),
        source=str(document["source"]),
        weights=str(document["source_weights_sha256"]),
        labels=tuple(map(str, document["labels"])),
        multi_label=bool(document["multi_label"]),
        vectors=vectors,
        graph=graph,
    )


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the sha256 of all its other fields.

    Without it, labels in a changed order would make every result wrong and nothing would fail.
    """
    content = {name: value for name, value in document.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return content | {"sha256": digest}


def read_graph(checkpoint: Checkpoint) -> Export | None:
    """The export whose graph computes; None for a checkpoint and for a torch-export.

    A torch-export has a checkpoint, which computes. Raises ModelError for an export that only other
    machines can run.
    """
    export = read_export(checkpoint)
    if export is not None and export.to == "coreml":
        raise ModelError(
            f"{checkpoint.model} is a Core ML export, which runs in apps on Apple's devices. Use "
            f"the checkpoint that it was made from here ({export.source})."
        )
    return export if export is not None and export.to in ENGINES else None


def engine_of(export: Export, engine: str) -> str:
    """The engine of an export. Raises ModelError when a job's `engine` is another one."""
    if engine not in ("auto", export.to):
        raise ModelError(
            f"{export.model} was exported for engine {export.to}, "
            f"so engine {engine} cannot run it. Set engine: auto."
        )
    return export.to


def vector_positions(export: Export, vectors: Sequence[VectorColumn]) -> list[int]:
    """The position in export.vectors of each column.

    Raises ModelError for a column that the graph does not give.
    """
    for vector in vectors:
        if (vector.layer, vector.pool) not in export.vectors:
            available = ", ".join(
                f"{pool} of layer {layer or 'last'}" for layer, pool in export.vectors
            )
            raise ModelError(
                f"{export.model} gives {available or 'no embedding at all'}, "
                f"and not {vector.pool} of layer {vector.layer or 'last'}: "
                "its outputs were fixed when it was exported. "
                f"Set embeddings to those, or export {export.source} again with the ones you want."
            )
    return [export.vectors.index((vector.layer, vector.pool)) for vector in vectors]


def labelled_by_export(spec: ModelSpec, export: Export, config: VisionConfig) -> ModelSpec:
    """The spec with the labels that the graph gives.

    Raises ModelError for a graph without labels, and for one whose scores are not transformers'.
    """
    if not export.labels:
        raise ModelError(
            f"{spec.model} was exported without labels; set labels: false, or export "
            f"{export.source} with them."
        )
    class_names = tuple(name for _, name in sorted(config.class_names().items()))
    has_own_head = export.labels == class_names
    if has_own_head and config.multi_label and not export.multi_label:
        needed = "raw values" if config.score_function is ScoreFunction.NONE else "a sigmoid"
        raise ModelError(
            f"{spec.model} was exported by an older vitray, whose graph applies a softmax where "
            f"transformers gives {needed}. Export {export.source} again."
        )
    regression = has_own_head and export.multi_label and config.score_function is ScoreFunction.NONE
    return replace(spec, labels=export.labels, regression=regression)


def other_labels_error(export: Export, field: str) -> ModelError:
    """The error for a job whose `field` asks for labels that an export cannot give."""
    return ModelError(
        f"{export.model} gives scores that were fixed when it was exported, "
        f"so `{field}` cannot change its labels. Use the checkpoint that it was made from "
        f"({export.source}), or relabel the dataset's embeddings (vitray relabel)."
    )


def hash_model(checkpoint: Checkpoint) -> str:
    """sha256 of what computes: an export's graph, or the safetensors.

    Raises ModelError where an export's files are not those that were exported.
    """
    export = read_export(checkpoint)
    if export is not None and export.to in ENGINES:
        return _hash_graph(export)
    weights = hash_weights(checkpoint)
    if export is not None and export.to == "torch-export" and weights != export.weights:
        raise ModelError(
            f"{checkpoint.model}: its safetensors are not those that were exported. "
            "Copy the whole directory again."
        )
    return weights


def computed_bytes(checkpoint: Checkpoint) -> int:
    """The size of what hash_model() reads. Raises ModelError where it is missing."""
    export = read_graph(checkpoint)
    files = weight_files(checkpoint) if export is None else export.files()
    return sum(os.path.getsize(path) for path in files if os.path.isfile(path))


def _hash_graph(export: Export) -> str:
    """sha256 over the files, in the order of their names."""
    total = hashlib.sha256()
    for name, path in zip(sorted(export.graph), export.files()):
        digest = hashlib.sha256()
        try:
            with open(path, "rb") as stream:
                while block := stream.read(8 << 20):
                    total.update(block)
                    digest.update(block)
        except OSError as error:
            raise ModelError(
                f"{export.model}: {name} cannot be read ({error.strerror}). "
                "Copy the whole directory."
            ) from error
        if digest.hexdigest() != export.graph[name]:
            raise ModelError(
                f"{export.model}: {name} is not the file that was exported: its sha256 changed. "
                "Copy it again."
            )
    return total.hexdigest()


def open_export(
    export: Export, spec: ModelSpec, outputs: ModelOutputs, placement: Placement
) -> GraphModel:
    """The graph, compiled and ready. Raises ModelError for a vector that it lacks."""
    from vitray.models.graph import GraphModel

    positions = vector_positions(export, outputs.vectors)
    if export.to == "onnx":
        from vitray.models.onnx_engine import open_graph

        run = open_graph(export.files()[0], placement.device)
    else:
        from vitray.models.openvino_engine import open_graph as open_openvino_graph

        run = open_openvino_graph(export.files()[1], spec.precision, placement.workers)
    first_vector = 1 if export.labels else 0

    def run_wanted(pixels: np.ndarray) -> list[np.ndarray]:
        results = run(pixels)
        columns = results[:1] if export.labels and outputs.top_k else []
        for vector, position in zip(outputs.vectors, positions):
            columns.append(_finish(vector, results[first_vector + position]))
        return columns

    return GraphModel(run_wanted, spec, outputs, placement.workers)


def _finish(vector: VectorColumn, values: np.ndarray) -> np.ndarray:
    """The column as Forward computes it: normalised in float32, then of the column's type."""
    return (unit(values) if vector.normalize else values).astype(vector.dtype)
