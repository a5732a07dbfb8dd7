"""From a job to a `ModelSpec`: the only module of this package that reads a `Job`.

It reads the fields and hands them on as values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from vitray.cpus import cores
from vitray.job import Job
from vitray.models.checkpoint import Checkpoint, VisionConfig, read_config
from vitray.models.checkpoint_store import locate
from vitray.models.engines import (
    require_engine,
    require_filter,
    require_pixels,
    timing_pays,
    with_fastest_engine,
)
from vitray.models.exported import (
    Export,
    engine_of,
    hash_model,
    labelled_by_export,
    other_labels_error,
    read_graph,
    vector_positions,
)
from vitray.models.labels import labelled_by_own_head, labelled_by_words, read_label_names
from vitray.models.linear_head import labelled_by_head, require_vector
from vitray.models.machine import (
    auto_batch_size,
    auto_precision,
    flop_per_image,
    require_decoder,
    require_hardware,
    resolve_device,
)
from vitray.models.pixels import read_pixels
from vitray.schema import ModelOutputs, ModelSpec, ScoreFunction, VectorColumn

log = logging.getLogger(__name__)


def identify(
    job: Job,
    runs_here: bool = True,
    images: int | None = None,
    checkpoint: Checkpoint | None = None,
    weights_sha256: str | None = None,
    before_timing: Callable[[], None] = lambda: None,
) -> ModelSpec:
    """The spec of the job's model, with precision, engine and batch size for this machine.

    The checkpoint is fetched once for each node, checked and hashed. With engine: auto, several
    installed engines are opened, checked and timed, for 10 s at most each.
    images: about how many the model will see; `auto` is torch for few of them (see timing_pays).
    before_timing: called before engines are timed.
    runs_here: False skips what depends on this machine, for a job in which no field is `auto`.
    checkpoint, weights_sha256: where they are known already.

    Raises ModelError for a checkpoint that is missing or that vitray does not know, and when it
    cannot do what the job asks for.
    """
    job = with_label_names(job)
    checkpoint = checkpoint or locate(job.model, job.revision)
    export = read_graph(checkpoint)
    config = read_config(checkpoint)
    engine = job.engine if export is None else engine_of(export, job.engine)
    device = _resolve_device(job) if runs_here else "cpu"
    spec = _describe(checkpoint, config, export, weights_sha256 or hash_model(checkpoint))
    spec = _with_arithmetic(spec, job, engine, device)
    if export is None:
        spec = _labelled(spec, job, checkpoint, config)
    else:
        spec = _labelled_by_export(spec, job, export, config)
    if runs_here:
        require_engine(spec.engine, device, spec.precision)
    require_pixels(spec.engine, job.decode)
    require_filter(spec, job.decode)
    outputs = model_outputs(job, spec)
    if export is not None:
        vector_positions(export, outputs.vectors)
    if engine != "auto":
        return spec
    if images is not None and not timing_pays(images, flop_per_image(spec)):
        why = f"too few images to time other engines: about {images:,}"
        return replace(spec, engine_why=why)
    before_timing()
    return with_fastest_engine(spec, outputs, device, cores())


def _resolve_device(job: Job) -> str:
    """The job's device on this machine, which has the hardware for its precision and decoder."""
    device = resolve_device(job.device)
    require_hardware(device, job.precision)
    require_decoder(device, job.decode)
    return device


def _describe(
    checkpoint: Checkpoint, config: VisionConfig, export: Export | None, weights_sha256: str
) -> ModelSpec:
    """What the checkpoint's files say: no labels yet, and placeholders for the arithmetic."""
    multi_label = config.hf.problem_type == "multi_label_classification"
    return ModelSpec(
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_sha256,
        family=config.family,
        labels=(),
        # not config.multi_label: datasets with only embeddings have this value in their fingerprint
        multi_label=multi_label if export is None else export.multi_label,
        dimension=config.dimension,
        layers=config.layers,
        prefix_tokens=config.prefix_tokens,
        has_cls=config.prefix_tokens > 0,
        pixels=read_pixels(checkpoint, config),
        precision="fp32",
        engine="torch",
        batch_size=1,
    )


def _with_arithmetic(spec: ModelSpec, job: Job, engine: str, device: str) -> ModelSpec:
    """The spec with the job's precision, engine and batch size; `auto` means those of the device.

    engine: `auto` gives torch here; the engines are compared later.
    """
    precision: str = job.precision
    if precision == "auto":
        precision = "fp32" if engine == "onnx" else auto_precision(device)
    batch_size = job.batch_size
    if batch_size == "auto":
        batch_size = auto_batch_size(device, spec.dimension)
    chosen = "torch" if engine == "auto" else engine
    return replace(spec, precision=precision, engine=chosen, batch_size=batch_size)


def _labelled(spec: ModelSpec, job: Job, checkpoint: Checkpoint, config: VisionConfig) -> ModelSpec:
    """The spec with the labels that the job asks for.

    Raises ModelError when the checkpoint cannot give them.
    """
    if job.head is not None:
        spec = labelled_by_head(spec, job.head)
    elif isinstance(job.labels, list):
        spec = labelled_by_words(spec, checkpoint, config, job.labels, job.prompts)
    elif job.labelled:
        spec = labelled_by_own_head(spec, checkpoint, config)
    if len(spec.labels) == 1 and spec.score_function is ScoreFunction.SOFTMAX:
        log.warning(
            "%s: %r is the only label, so its score is 1.0 for every image: a softmax compares "
            "labels. Add a label for all other images.",
            spec.head or spec.model,
            spec.labels[0],
        )
    return spec


def _labelled_by_export(
    spec: ModelSpec, job: Job, export: Export, config: VisionConfig
) -> ModelSpec:
    """The spec with the labels of the export's graph. Raises ModelError for any others."""
    if job.head is not None:
        raise other_labels_error(export, "head")
    if isinstance(job.labels, list):
        raise other_labels_error(export, "labels")
    return labelled_by_export(spec, export, config) if job.labelled else spec


def with_label_names(job: Job) -> Job:
    """The job with its file of labels read, so that no other machine needs the file.

    Raises JobError when the file cannot be read or has a label twice.
    """
    if not isinstance(job.labels, str):
        return job
    return job.model_copy(update={"labels": read_label_names(job.labels)})


def vector_columns(job: Job, spec: ModelSpec) -> list[VectorColumn]:
    """One column for each of job.embeddings.

    Raises ModelError for a layer or a token that the model does not have.
    """
    columns = []
    for embedding in job.embeddings:
        layer = None if embedding.layer == "last" else embedding.layer
        require_vector(spec, layer, embedding.pool)
        columns.append(
            VectorColumn(
                column=job.column(embedding),
                dimension=spec.dimension,
                layer=layer,
                pool=embedding.pool,
                normalize=embedding.normalize,
                dtype=embedding.dtype,
            )
        )
    return columns


def model_outputs(job: Job, spec: ModelSpec) -> ModelOutputs:
    """The outputs that the job asks for. Raises what `vector_columns` raises."""
    return ModelOutputs(tuple(vector_columns(job, spec)), job.top_k if job.labelled else 0)
