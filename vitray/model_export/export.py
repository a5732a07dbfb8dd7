"""`vitray export MODEL`: a checkpoint as ONNX, OpenVINO, torch-export or Core ML, smaller if asked,
judged before it is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from vitray.errors import Disagreement, JobError, ModelError
from vitray.evaluation import agreement
from vitray.evaluation.agreement import Judgement, Sample
from vitray.job import Job
from vitray.model_export import graphs
from vitray.models import Model, identify, open_model, torch_threads_kept, vector_columns
from vitray.models.checkpoint import EXPORT, locate, weight_files
from vitray.models.exported import FORMAT, read_export, seal
from vitray.models.machine import cores
from vitray.models.pixels import FILES
from vitray.schema import ModelSpec, VectorColumn
from vitray.storage import absolute, new_folder
from vitray.version import __version__

PACKAGES = {
    "onnx": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "torch-export": (),
    "coreml": ("coremltools",),
}


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What was written. model: the one that it was made from. how: its quantisation, "" for
    float32.

    weights_sha256: what the fingerprint of a dataset made with it will hold; None for what vitray
    cannot run.
    """

    into: str
    model: str
    to: str
    how: str
    weights_sha256: str | None
    judgement: Judgement

    def __str__(self) -> str:
        rows = [f"{what:24}{value}" for what, value in self.judgement.rows()]
        return "\n".join([f"{self.into}: {self.model} as {self.to} {self.how or 'float32'}", *rows])


def export_model(
    job: Job, to: str, how: str, into: str, min_agreement: float | None = None
) -> ExportedModel:
    """The job's model, exported to a new local folder that is a `model:` too; its source calibrates
    and judges.

    how: "", fp16, int8, int8-weights or int4-weights. Raises JobError for a combination that is not
    known, SourceError for too few images, Disagreement below min_agreement; then nothing is
    written.
    """
    graphs.require(to, how)
    if to == "torch-export" and (job.head is not None or not isinstance(job.labels, bool)):
        raise JobError(
            "--to torch-export keeps the checkpoint's own labels: as a `model:` it is the "
            "checkpoint. Use --to onnx or openvino."
        )
    if min_agreement is not None and to == "coreml":
        raise JobError(
            "--min-agreement: Core ML does not run here, so nothing can agree. Leave it out, and "
            "judge it on a device."
        )
    found = locate(job.model, job.revision)
    if earlier := read_export(found):
        raise ModelError(
            f"{found.model} is an export already ({earlier.to}). Give the checkpoint that it was "
            f"made from."
        )
    job = job.model_copy(update={"engine": "torch", "device": "cpu"})
    with new_folder(into, "--into") as folder, torch_threads_kept():
        spec = identify(job)
        source = graphs.Source(found, spec, job.labelled, _raw(job, spec), np.empty(0))
        images = agreement.sample(job, spec, calibrates=how == "int8")
        graphs.write(replace(source, calibration=images.calibration), to, how, folder)
        _describe(source, to, how, folder)
        judgement, weights = _judge(job, source, images, to, folder)
        done, share = (
            ExportedModel(absolute(into), _name(source), to, how, weights, judgement),
            judgement.share(),
        )
        if min_agreement is not None and (share is None or share < min_agreement):
            raise Disagreement(
                f"{to} {how or 'float32'}: {share or 0:.2%} agree with the original, below "
                f"--min-agreement {min_agreement:g}; nothing was "
                "written. Calibrate on more images that are like those to come, or quantise less: "
                "--int8-weights, --fp16 or not at all.",
                done,
            )
        _sign(folder, source, done)
    return done


def _raw(job: Job, spec: ModelSpec) -> list[VectorColumn]:
    """The vectors that the graph gives: what a job does to them afterwards, normalising and
    halving, stays the job's.
    """
    places = {(v.layer, v.pool) for v in vector_columns(job, spec)}
    ordered = sorted(places, key=lambda place: (place[0] or spec.layers + 1, place[1]))
    return [
        VectorColumn(f"{pool}_{layer or 'last'}", spec.dimension, layer, pool, False, "float32")
        for layer, pool in ordered
    ]


def _name(source: graphs.Source) -> str:
    """Of the model, for whoever gets the directory: a path of this machine would say nothing to
    them.
    """
    return (
        source.found.model
        if source.found.revision
        else os.path.basename(source.found.model.rstrip("/"))
    )


def _graph_files(folder: Path) -> list[Path]:
    """All but what was copied from the checkpoint."""
    copied = (".safetensors", ".index.json", "config.json", EXPORT)
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(copied)
    )


def _describe(source: graphs.Source, to: str, how: str, folder: Path) -> None:
    """What makes a `model:` of the graph: config, processor, and what it is."""
    digests = dict[str, str]()
    for file in _graph_files(folder):
        with open(file, "rb") as stream:
            digests[str(file.relative_to(folder))] = hashlib.file_digest(
                stream, "sha256"
            ).hexdigest()
    nncf = ("nncf",) if to == "openvino" and how.startswith("int") else ()
    said = {
        "format": FORMAT,
        "to": to,
        "quantisation": how,
        "source": _name(source),
        "revision": source.spec.revision,
        "source_weights_sha256": source.spec.weights_sha256,
        "labels": source.spec.labels,
        "multi_label": source.spec.multi_label,
        "vectors": [{"layer": v.layer or "last", "pool": v.pool} for v in source.vectors],
        "results": source.names,
        "graph": digests,
        "versions": {"vitray": __version__}
        | {name: version(name) for name in ("torch", "transformers", *PACKAGES[to], *nncf)},
    }
    (folder / EXPORT).write_text(json.dumps(seal(said), indent=1))
    for name in ("config.json", *FILES):
        path = os.path.join(source.found.directory, name)
        if os.path.isfile(path):
            shutil.copy(path, folder)


def _judge(
    job: Job, source: graphs.Source, images: Sample, to: str, folder: Path
) -> tuple[Judgement, str | None]:
    """And the weights_sha256 that a dataset made with it will have; None for what is no `model:`
    here.
    """
    spec, threads = source.spec, cores()
    files = [
        *_graph_files(folder),
        *folder.glob("*.safetensors"),
    ]  # a torch-export holds the weights twice
    sizes = [
        sum(os.path.getsize(path) for path in paths)
        for paths in (files, weight_files(source.found))
    ]
    figures: dict[str, Any] = {
        "images": len(images.judged),
        "calibrated_on": len(images.calibration),
        "apart": images.apart,
    }
    figures |= {
        "megabytes": sizes[0] / 1e6,
        "ratio": sizes[0] / sizes[1],
        "torch_precision": spec.precision,
    }
    if to == "coreml":
        return Judgement(**figures), None

    def opened(said: ModelSpec, precision: str, top_k: int) -> Model:
        return open_model(
            replace(said, precision=precision), source.vectors, top_k, job.labelled, "cpu", threads
        )

    if to == "torch-export":
        mine, precision = spec, "fp32"
        exported = exact = graphs.run_program(source)
    else:
        own = {"labels": job.labelled, "head": None}  # words and a head are in the graph by now
        mine = identify(
            job.model_copy(update={"model": str(folder), "revision": None, "engine": "auto", **own})
        )
        precision = mine.precision
        exported = opened(mine, precision, len(spec.labels))
        exact = exported if precision == "fp32" else opened(mine, "fp32", len(spec.labels))
    expected = opened(spec, "fp32", len(spec.labels)).predict(images.judged)
    found = exported.predict(images.judged)
    figures |= agreement.answers(expected, found) | {"precision": precision}
    figures["error"] = agreement.error(
        expected, found if exact is exported else exact.predict(images.judged)
    )
    pixels = np.resize(images.judged, (2 * threads * spec.batch_size, *images.judged.shape[1:]))
    figures |= agreement.speeds(exported, opened(spec, spec.precision, job.top_k), pixels)
    return Judgement(**figures), mine.weights_sha256


def _sign(folder: Path, source: graphs.Source, done: ExportedModel) -> None:
    """The judgement into vitray_export.json, and the model card."""
    said = json.loads((folder / EXPORT).read_text())
    (folder / EXPORT).write_text(
        json.dumps(seal(said | {"judgement": asdict(done.judgement)}), indent=1)
    )
    base = f"base_model: {done.model}\n" if source.spec.revision else ""
    use = (
        "It is for apps on Apple's devices."
        if done.to == "coreml"
        else "It is a `model:` of vitray, with `engine: auto`."
    )
    name, (height, width) = (
        re.sub(r"[^\w./ -]", "_", done.model),
        source.spec.pixels.shape,
    )  # no markup
    rows = "\n".join(f"| {what} | {value} |" for what, value in done.judgement.rows())
    (folder / "README.md").write_text(f"""---
{base}tags: [{", ".join(filter(None, ("vitray", done.to, done.how)))}]
---
# {name} as {done.to}, {done.how or "float32"}

Made by vitray {__version__} from weights with SHA-256 {source.spec.weights_sha256}. {use}
It takes pixels [images, {height}, {width}, 3], RGB, 0 to 255, and gives {", ".join(source.names)}.

| beside the original | |
| --- | --- |
{rows}
""")
