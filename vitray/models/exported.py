"""An exported model: a directory that `vitray export` wrote, as a `model:`. Needs no torch; its
graph is data, nothing in it is executed.

vitray_export.json says what the directory is; config.json and the image processor's file are those
of the checkpoint.
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
from vitray.job import Job
from vitray.models.checkpoint import (
    EXPORT,
    GRAPH_FILES,
    Checkpoint,
    VisionConfig,
    hash_weights,
    read_json,
)
from vitray.schema import ModelSpec, ScoreFunction, VectorColumn

if TYPE_CHECKING:
    from vitray.models.graph import GraphModel

FORMAT = 2
ENGINES = ("onnx", "openvino")  # those of which the graph is what vitray computes with
NEEDED = {"onnx": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}


@dataclass(frozen=True, slots=True)
class Exported:
    """to, how: what --to and the quantisation said. source: the model that it was made from;
    weights: sha256 of its safetensors.

    labels: the class names, in the order of the scores that are the graph's first result; empty
    where it gives none.
    multi_label: whether each of those scores stands alone, a sigmoid or a raw value. vectors:
    (layer, pool) of the results that follow, each [n, D] in float32 and not normalised. graph:
    SHA-256 by file.
    """

    to: str
    how: str
    source: str
    weights: str
    labels: tuple[str, ...]
    multi_label: bool
    vectors: tuple[tuple[int | None, str], ...]
    graph: dict[str, str]

    def files_in(self, directory: str) -> list[str]:
        return [os.path.join(directory, name) for name in sorted(self.graph)]


def read_export(found: Checkpoint) -> Exported | None:
    """What vitray_export.json says; None for a checkpoint. Raises ModelError for one that no export
    wrote.
    """
    if not os.path.isfile(os.path.join(found.directory, EXPORT)):
        return None
    said = read_json(found, EXPORT)
    try:
        if said["format"] != FORMAT:
            raise ValueError(f"format {said['format']}, this vitray knows {FORMAT}")
        if said != seal(said):
            raise ValueError("it was changed")
        vectors = tuple(
            (None if v["layer"] == "last" else int(v["layer"]), str(v["pool"]))
            for v in said["vectors"]
        )
        graph = {str(name): str(digest) for name, digest in said["graph"].items()}
        if said["to"] in ENGINES and not NEEDED[said["to"]] <= graph.keys() <= set(GRAPH_FILES):
            raise ValueError(f"graph files {', '.join(graph)}")
        labels = tuple(map(str, said["labels"])), bool(said["multi_label"])
        source = str(said["source"]), str(said["source_weights_sha256"])
        return Exported(
            str(said["to"]), str(said["quantisation"]), *source, *labels, vectors, graph
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{found.model}: {EXPORT} is not one that vitray wrote ({error}). Export the model "
            f"again."
        ) from error


def seal(said: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of all else that is said: a label in another place would make every answer
    wrong, and nothing else would tell.
    """
    rest = {name: value for name, value in said.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def read_graph(found: Checkpoint) -> Exported | None:
    """The export whose graph is what computes; None for a checkpoint, and for a torch-export, whose
    checkpoint computes.

    Raises ModelError for what only other machines can run.
    """
    export = read_export(found)
    if export is not None and export.to == "coreml":
        raise ModelError(
            f"{found.model} is a Core ML export, which runs in apps on Apple's devices. Use the "
            f"checkpoint that it was made of here ({export.source})."
        )
    return export if export is not None and export.to in ENGINES else None


def engine_of(export: Exported, model: str, asked: str) -> str:
    """The engine of an export. Raises ModelError when the job asks for another."""
    if asked not in ("auto", export.to):
        raise ModelError(
            f"{model} was exported for engine {export.to}, so engine {asked} cannot run it. Set "
            f"engine: auto."
        )
    return export.to


def places(export: Exported, model: str, vectors: Sequence[VectorColumn]) -> list[int]:
    """Which of export.vectors each column is made of. Raises ModelError for one that the graph does
    not give.
    """
    found = []
    for vector in vectors:
        if (vector.layer, vector.pool) not in export.vectors:
            has = (
                ", ".join(f"{pool} of layer {layer or 'last'}" for layer, pool in export.vectors)
                or "no embedding at all"
            )
            raise ModelError(
                f"{model} gives {has}, and not {vector.pool} of layer {vector.layer or 'last'}: "
                f"what it gives was fixed when it was "
                f"exported. Set embeddings to those, or export {export.source} again with the "
                f"ones you want."
            )
        found.append(export.vectors.index((vector.layer, vector.pool)))
    return found


def labelled(job: Job, spec: ModelSpec, export: Exported, config: VisionConfig) -> ModelSpec:
    """The spec with the labels that the graph gives.

    Raises ModelError when the job asks for other ones, and for a graph whose scores are not those
    of transformers.
    """
    if job.head is not None or isinstance(job.labels, list):
        field = "labels" if job.head is None else "head"
        raise ModelError(
            f"{spec.model} gives scores that were fixed when it was exported, so `{field}` cannot "
            f"change its labels. "
            f"Use the checkpoint that it was made of ({export.source}), or relabel the dataset's "
            f"embeddings (vitray relabel)."
        )
    if job.labelled and not export.labels:
        raise ModelError(
            f"{spec.model} was exported without labels; set labels: false, or export "
            f"{export.source} with them."
        )
    if not job.labelled:
        return spec
    has_own_head = export.labels == tuple(name for _, name in sorted(config.class_names().items()))
    if has_own_head and config.multi_label and not export.multi_label:
        needed = "raw values" if config.score_function is ScoreFunction.NONE else "a sigmoid"
        raise ModelError(
            f"{spec.model} was exported by an older vitray, whose graph applies a softmax where "
            f"transformers gives {needed}. "
            f"Export {export.source} again."
        )
    regression = has_own_head and export.multi_label and config.score_function is ScoreFunction.NONE
    return replace(spec, labels=export.labels, regression=regression)


def hash_model(found: Checkpoint) -> str:
    """sha256 of what computes, an export's graph or the safetensors. Raises ModelError where an
    export's are not those it was made with.
    """
    export = read_export(found)
    if export is not None and export.to in ENGINES:
        return _hash_graph(found, export)
    weights = hash_weights(found)
    if export is not None and export.to == "torch-export" and weights != export.weights:
        raise ModelError(
            f"{found.model}: its safetensors are not those that were exported. Copy the whole "
            f"directory again."
        )
    return weights


def _hash_graph(found: Checkpoint, export: Exported) -> str:
    """One file after another in the order of their names."""
    together = hashlib.sha256()
    for name, path in zip(sorted(export.graph), export.files_in(found.directory)):
        alone = hashlib.sha256()
        try:
            with open(path, "rb") as stream:
                while block := stream.read(8 << 20):
                    together.update(block)
                    alone.update(block)
        except OSError as error:
            raise ModelError(
                f"{found.model}: {name} cannot be read ({error.strerror}). Copy the whole "
                f"directory."
            ) from error
        if alone.hexdigest() != export.graph[name]:
            raise ModelError(
                f"{found.model}: {name} is not the file that was exported: its sha256 changed. "
                f"Copy it again."
            )
    return together.hexdigest()


def open_exported(
    found: Checkpoint,
    export: Exported,
    spec: ModelSpec,
    vectors: list[VectorColumn],
    top_k: int,
    device: str,
    threads: int,
) -> GraphModel:
    """The graph, compiled and ready. top_k: 0 without labels. Raises ModelError for a vector that
    it lacks.
    """
    from vitray.models.graph import GraphModel

    first, chosen = int(bool(export.labels)), places(export, found.model, vectors)
    file = export.files_in(found.directory)[0 if export.to == "onnx" else 1]
    if export.to == "onnx":
        from vitray.models import onnx_engine

        run = onnx_engine.open_graph(file, device)
    else:
        from vitray.models import openvino_engine

        run = openvino_engine.open_graph(file, spec.precision, threads)

    def asked(pixels: np.ndarray) -> list[np.ndarray]:
        results = run(pixels)
        scores = results[:1] if first and top_k else []
        return scores + [
            _finish(vector, results[first + place]) for vector, place in zip(vectors, chosen)
        ]

    return GraphModel(asked, spec, vectors, top_k, threads if device == "cpu" else 1)


def _finish(vector: VectorColumn, values: np.ndarray) -> np.ndarray:
    """As Forward does it: normalised in float32, then the column's type."""
    if vector.normalize:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return values.astype(vector.dtype)
