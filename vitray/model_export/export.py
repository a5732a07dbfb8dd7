"""`vitray export-model`: a checkpoint as ONNX, OpenVINO, torch-export or Core ML.

Each export is compared with the original first. One that agrees too little is not written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from vitray.cpus import cores
from vitray.errors import Disagreement, JobError, ModelError
from vitray.evaluation.agreement import (
    Judgement,
    ModelComparison,
    Size,
    measure_agreement,
    measure_error,
    measure_speed,
)
from vitray.job import Job
from vitray.model_export import graphs
from vitray.model_export.samples import Sample, sample_images
from vitray.models import Model, identify, open_model, torch_threads_kept, vector_columns
from vitray.models.checkpoint import EXPORT, Checkpoint, weight_files
from vitray.models.checkpoint_store import locate
from vitray.models.exported import FORMAT, read_export, seal
from vitray.models.pixels import FILES
from vitray.schema import ModelOutputs, ModelSpec, VectorColumn
from vitray.storage import absolute, new_folder, sha256_of
from vitray.version import __version__

# whose versions vitray_export.json names, by format
PACKAGES = {
    "onnx": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "torch-export": (),
    "coreml": ("coremltools",),
}


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What was written. model: the original. how: the quantisation, "" for float32.

    weights_sha256: as in the fingerprint of a dataset of this model; None if vitray cannot run it.
    """

    into: str
    model: str
    to: str
    how: str
    weights_sha256: str | None
    comparison: ModelComparison

    def __str__(self) -> str:
        title = f"{self.into}: {self.model} as {self.to} {self.how or 'float32'}"
        rows = self.comparison.rows()
        return "\n".join([title, *(f"{figure:24}{text}" for figure, text in rows)])

    def figures(self) -> ExportFigures:
        """What `--json` prints."""
        return ExportFigures(
            into=self.into,
            model=self.model,
            to=self.to,
            how=self.how,
            weights_sha256=self.weights_sha256,
            judgement=self.comparison.figures(),
        )


@dataclass(frozen=True, slots=True)
class ExportFigures:
    """An exported model and how well it agrees with the original.

    model: the original. how: the quantisation, "" for float32. weights_sha256: as in the
    fingerprint of a dataset of this model; None if vitray cannot run it.
    """

    into: str
    model: str
    to: str
    how: str
    weights_sha256: str | None
    judgement: Judgement


def export_model(
    job: Job, to: str, quantisation: str, into: str, min_agreement: float | None = None
) -> ExportedModel:
    """The job's model in a new local folder, which is a `model:` too.

    The images of the job's source calibrate it and compare it with the original.
    quantisation: "", fp16, int8, int8-weights or int4-weights.
    Raises JobError for a combination that does not exist, SourceError for too few images, and
    Disagreement below min_agreement. Then nothing is written.
    """
    _require_possible(job, to, quantisation, min_agreement)
    original = _original(job)
    job = job.model_copy(update={"engine": "torch", "device": "cpu"})
    with new_folder(into, "--into") as folder, torch_threads_kept():
        spec = identify(job)
        source = graphs.Source(original, spec, job.labelled, _raw_vectors(job, spec), np.empty(0))
        images = sample_images(job, spec, calibrates=quantisation == "int8")
        source = replace(source, calibration=images.calibration)
        graphs.write(source, to, quantisation, folder)
        _write_description(source, to, quantisation, folder)
        comparison, weights = _compare(job, source, images, to, folder)
        export = ExportedModel(
            into=absolute(into),
            model=_public_name(original),
            to=to,
            how=quantisation,
            weights_sha256=weights,
            comparison=comparison,
        )
        _require_agreement(export, min_agreement)
        _write_comparison(folder, source, export)
        return export


def _require_possible(job: Job, to: str, quantisation: str, min_agreement: float | None) -> None:
    """Raises JobError for options that do not go together."""
    graphs.require(to, quantisation)
    if to == "torch-export" and (job.head is not None or not isinstance(job.labels, bool)):
        raise JobError(
            "--to torch-export keeps the checkpoint's own labels: as a `model:` it is the "
            "checkpoint. Use --to onnx or openvino."
        )
    if min_agreement is not None and to == "coreml":
        raise JobError(
            "--min-agreement: Core ML does not run here, so its agreement cannot be measured. "
            "Leave the option out, and compare the export on a device."
        )


def _original(job: Job) -> Checkpoint:
    """The checkpoint to export. Raises ModelError for a model that is an export itself."""
    checkpoint = locate(job.model, job.revision)
    if earlier := read_export(checkpoint):
        raise ModelError(
            f"{checkpoint.model} is an export already ({earlier.to}). "
            "Give the checkpoint that it was made from."
        )
    return checkpoint


def _require_agreement(export: ExportedModel, least: float | None) -> None:
    """Raises Disagreement if the export agrees less than `least`, or cannot be compared."""
    share = export.comparison.share()
    if least is None or (share is not None and share >= least):
        return
    raise Disagreement(
        f"{export.to} {export.how or 'float32'}: {share or 0:.2%} agree with the original, "
        f"below --min-agreement {least:g}; nothing was written. Calibrate on more images "
        "that are like those to come, or quantise less: --int8-weights, --fp16 or not at all.",
        export,
    )


def _raw_vectors(job: Job, spec: ModelSpec) -> list[VectorColumn]:
    """The vectors that the graph computes: one for each layer and pool, float32, not normalised.

    A job normalises them and stores them in float16 as it likes.
    """
    layers = {(vector.layer, vector.pool) for vector in vector_columns(job, spec)}
    in_order = sorted(layers, key=lambda pair: (pair[0] or spec.layers + 1, pair[1]))
    return [
        VectorColumn(f"{pool}_{layer or 'last'}", spec.dimension, layer, pool, False, "float32")
        for layer, pool in in_order
    ]


def _public_name(original: Checkpoint) -> str:
    """The model's id or the name of its folder: other people may get the export, not this path."""
    return original.model if original.revision else os.path.basename(original.model.rstrip("/"))


def _graph_files(folder: Path) -> list[Path]:
    """All files but those copied from the checkpoint."""
    copied = (".safetensors", ".index.json", "config.json", EXPORT)
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(copied)
    )


def _write_description(source: graphs.Source, to: str, quantisation: str, folder: Path) -> None:
    """The files that make a `model:` of the graph: configuration, processor, vitray_export.json."""
    nncf = ("nncf",) if to == "openvino" and quantisation.startswith("int") else ()
    packages = ("torch", "transformers", *PACKAGES[to], *nncf)
    description = {
        "format": FORMAT,
        "to": to,
        "quantisation": quantisation,
        "source": _public_name(source.original),
        "revision": source.spec.revision,
        "source_weights_sha256": source.spec.weights_sha256,
        "labels": source.spec.labels,
        "multi_label": source.spec.multi_label,
        "vectors": [{"layer": v.layer or "last", "pool": v.pool} for v in source.vectors],
        "results": source.names,
        "graph": {
            str(file.relative_to(folder)): sha256_of(str(file)) for file in _graph_files(folder)
        },
        "versions": {"vitray": __version__, **{name: version(name) for name in packages}},
    }
    (folder / EXPORT).write_text(json.dumps(seal(description), indent=1))
    for name in ("config.json", *FILES):
        path = os.path.join(source.original.directory, name)
        if os.path.isfile(path):
            shutil.copy(path, folder)


@dataclass(frozen=True, slots=True)
class _OpenedExport:
    """An export, ready to predict. exact: the same one in fp32. precision: what `model` uses."""

    model: Model
    exact: Model
    precision: str
    weights_sha256: str


def _compare(
    job: Job, source: graphs.Source, images: Sample, to: str, folder: Path
) -> tuple[ModelComparison, str | None]:
    """The export beside the original, and its weights_sha256; None if it cannot run here."""
    spec = source.spec
    unmeasured = ModelComparison(
        images=len(images.compared),
        calibrated_on=len(images.calibration),
        is_disjoint=images.is_disjoint,
        size=_size(source, folder),
        torch_precision=spec.precision,
    )
    if to == "coreml":
        return unmeasured, None
    export = _open_export(job, source, to, folder)
    expected = _open(job, source, spec, "fp32", len(spec.labels)).predict(images.compared)
    computed = export.model.predict(images.compared)
    is_exact = export.exact is export.model
    exact = computed if is_exact else export.exact.predict(images.compared)
    original = _open(job, source, spec, spec.precision, job.top_k)
    shape = (2 * cores() * spec.batch_size, *images.compared.shape[1:])
    comparison = replace(
        unmeasured,
        precision=export.precision,
        agreement=measure_agreement(expected, computed),
        error=measure_error(expected, exact),
        speed=measure_speed(export.model, original, np.resize(images.compared, shape)),
    )
    return comparison, export.weights_sha256


def _size(source: graphs.Source, folder: Path) -> Size:
    """The size of the export. A torch-export holds the weights twice."""
    files = [*_graph_files(folder), *folder.glob("*.safetensors")]
    size = sum(os.path.getsize(path) for path in files)
    original_size = sum(os.path.getsize(path) for path in weight_files(source.original))
    return Size(size / 1e6, size / original_size)


def _open_export(job: Job, source: graphs.Source, to: str, folder: Path) -> _OpenedExport:
    if to == "torch-export":
        program = graphs.run_program(source)
        return _OpenedExport(program, program, "fp32", source.spec.weights_sha256)
    # the labels of a job, or its head, are in the graph already
    own = {"model": str(folder), "revision": None, "labels": job.labelled, "head": None}
    spec = identify(job.model_copy(update={**own, "engine": "auto"}))
    labels = len(source.spec.labels)
    model = _open(job, source, spec, spec.precision, labels)
    exact = model if spec.precision == "fp32" else _open(job, source, spec, "fp32", labels)
    return _OpenedExport(model, exact, spec.precision, spec.weights_sha256)


def _open(job: Job, source: graphs.Source, spec: ModelSpec, precision: str, top_k: int) -> Model:
    spec = replace(spec, precision=precision)
    outputs = ModelOutputs(tuple(source.vectors), top_k if job.labelled else 0)
    return open_model(spec, outputs, "cpu", cores())


def _write_comparison(folder: Path, source: graphs.Source, export: ExportedModel) -> None:
    """Add the comparison to vitray_export.json, and write the model card."""
    description = json.loads((folder / EXPORT).read_text())
    description["judgement"] = asdict(export.comparison.figures())
    (folder / EXPORT).write_text(json.dumps(seal(description), indent=1))
    (folder / "README.md").write_text(_card(source, export))


def _card(source: graphs.Source, export: ExportedModel) -> str:
    base = f"base_model: {export.model}\n" if source.spec.revision else ""
    tags = ", ".join(tag for tag in ("vitray", export.to, export.how) if tag)
    name = re.sub(r"[^\w./ -]", "_", export.model)  # no markup
    height, width = source.spec.pixels.shape
    use = "Use it as a `model:` of vitray, with `engine: auto`."
    if export.to == "coreml":
        use = "Use it in apps on Apple's devices."
    rows = "\n".join(f"| {figure} | {text} |" for figure, text in export.comparison.rows())
    return f"""---
{base}tags: [{tags}]
---
# {name} as {export.to}, {export.how or "float32"}

Made by vitray {__version__} from weights with SHA-256 {source.spec.weights_sha256}. {use}
It takes pixels [images, {height}, {width}, 3], RGB, 0 to 255, and gives {", ".join(source.names)}.

| beside the original | |
| --- | --- |
{rows}
"""
