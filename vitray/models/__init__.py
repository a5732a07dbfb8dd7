"""The door to models: what a checkpoint is (`identify`), which vectors it can give, and
`open_model`.

Importing this costs nothing: torch and transformers come in with the first call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from vitray.crash import crash_point
from vitray.errors import ModelError
from vitray.job import Job
from vitray.schema import ModelSpec, VectorColumn


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says of N images.

    ids: int32 [N, k], scores: float32 [N, k], best first; None when labels are not asked for.
    vectors: by column name, float32 or float16 [N, D].
    """

    ids: np.ndarray | None
    scores: np.ndarray | None
    vectors: dict[str, np.ndarray]


class Model(Protocol):
    """An opened checkpoint, whatever engine runs it."""

    def predict(self, pixels: Any) -> Predictions:
        """Labels and embeddings. pixels: uint8 [N, H, W, 3], RGB, at the processor's size, any N >=
        0; an array.

        After a decode on the device it is a tensor there.
        """
        ...


def identify(job: Job, runs_here: bool = True) -> ModelSpec:
    """What the job's checkpoint is: fetched once a node, checked and hashed; precision, engine and
    batch size for this machine.

    With engine: auto and more than one engine installed each is opened, checked and timed, for 10 s
    at most.
    runs_here: else nothing of this machine is asked for; for a job in which no field is `auto`.
    Raises ModelError for a checkpoint that is not there, that vitray does not know, or that cannot
    do what is asked.
    """
    from vitray.models import checkpoint, engines, exported, labelling, machine, pixels

    job = labelling.with_label_names(job)
    found = checkpoint.locate(job.model, job.revision)
    graph = exported.read_graph(found)
    config = checkpoint.read_config(found)
    asked = exported.engine_of(graph, found.model, job.engine) if graph else job.engine
    device = machine.resolve_device(job.device) if runs_here else "cpu"
    if runs_here:
        machine.require(device, job.precision, job.decode)
    fastest = "fp32" if asked == "onnx" else machine.auto_precision(device)
    spec = ModelSpec(
        model=found.model,
        revision=found.revision,
        weights_sha256=exported.hash_model(found),
        family=config.family,
        labels=(),
        # without labels as it always was: datasets of embeddings alone have it in their fingerprint
        multi_label=graph.multi_label
        if graph
        else config.hf.problem_type == "multi_label_classification",
        dimension=config.dimension,
        layers=config.layers,
        prefix_tokens=config.prefix_tokens,
        has_cls=config.prefix_tokens > 0,
        pixels=pixels.read_pixels(found, config),
        precision=fastest if job.precision == "auto" else job.precision,
        engine="torch" if asked == "auto" else asked,
        batch_size=machine.auto_batch_size(device, config.dimension)
        if job.batch_size == "auto"
        else job.batch_size,
    )
    spec = (
        exported.labelled(job, spec, graph, config)
        if graph
        else labelling.labelled(job, spec, found, config)
    )
    if runs_here:
        engines.require(spec.engine, device, spec.precision)
    engines.require_pixels(spec.engine, job.decode)
    engines.require_filter(spec, job.decode)
    if graph:
        exported.places(graph, found.model, vector_columns(job, spec))
    return _with_fastest_engine(job, spec, device) if asked == "auto" else spec


def _with_fastest_engine(job: Job, spec: ModelSpec, device: str) -> ModelSpec:
    from vitray.models import engines, machine

    names, out = engines.usable(device, spec.precision)
    if len(names) == 1:
        return replace(spec, engine_why=out)

    columns, threads = vector_columns(job, spec), machine.cores()

    def opening(engine: str, precision: str, top_k: int) -> engines.Open:
        chosen = replace(spec, engine=engine, precision=precision)
        return lambda: open_model(chosen, columns, top_k, job.labelled, job.device, threads)

    choices = {name: opening(name, spec.precision, job.top_k) for name in names}
    engine, why = engines.fastest(spec, choices, opening("torch", "fp32", len(spec.labels)))
    return replace(spec, engine=engine, engine_why=", ".join(filter(None, [why, out])))


def with_label_names(job: Job) -> Job:
    """The job with its file of labels read, so that no other machine needs it. Raises JobError when
    that cannot be.
    """
    from vitray.models import labelling

    return labelling.with_label_names(job)


def runs_on(job: Job) -> str:
    """cuda, xpu, mps or cpu: what job.device means on this machine. Raises ModelError when it is
    not there.
    """
    from vitray.models import machine

    return "cpu" if job.device == "cpu" else machine.resolve_device(job.device)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before: a model on the CPU leaves it with one."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiles(job: Job, images: int, device: str) -> bool:
    """Whether an actor that will see so many images lets torch compile its model. Needs no
    torch.
    """
    from vitray.models import machine

    return job.compile == "on" or (job.compile == "auto" and machine.compiling_pays(device, images))


def require_precision(job: Job) -> None:
    """Raises ModelError for an engine that does not compute in the precision that is asked. Needs
    no torch.
    """
    from vitray.models import engines

    if reason := engines.lacks(job.engine, job.precision):
        raise ModelError(reason)


def will_compile(job: Job, images: int) -> str:
    """For people: whether a run over so many images compiles the model. Needs no torch."""
    from vitray.models.machine import COMPILE_PAYS

    if job.engine not in ("auto", "torch"):
        return f"off: engine {job.engine} compiles by itself"
    if job.compile != "auto":
        return job.compile
    cpu, gpu = COMPILE_PAYS["cpu"], COMPILE_PAYS["cuda"]
    say = "off" if images < min(cpu, gpu) else "on where a machine, or a GPU, gets enough of them"
    return (
        f"auto: {say} ({images:,} images; on from {cpu:,} a machine, or {gpu:,} a GPU, in one run)"
    )


def vector_columns(job: Job, spec: ModelSpec) -> list[VectorColumn]:
    """One column for each of job.embeddings. Raises ModelError for a layer or a token that the
    model does not have.
    """
    from vitray.models.labelling import require_vector

    columns = []
    for embedding in job.embeddings:
        layer = None if embedding.layer == "last" else embedding.layer
        require_vector(spec, layer, embedding.pool)
        column = job.column(embedding)
        columns.append(
            VectorColumn(
                column, spec.dimension, layer, embedding.pool, embedding.normalize, embedding.dtype
            )
        )
    return columns


def open_model(
    spec: ModelSpec,
    vectors: list[VectorColumn],
    top_k: int,
    labels: bool,
    device: str,
    threads: int,
    compiled: bool = False,
) -> Model:
    """The checkpoint, loaded and ready.

    device: as in Job.device. threads: how many batches a CPU computes at once, unused on an
    accelerator. compiled: let torch compile
    the forward pass first: a minute, and the same numbers within the precision's tolerance
    (`compiles` says when).
    Raises ModelError when the weights are not those of `spec`, when one that is needed is missing,
    and when spec.engine cannot run here.
    """
    from vitray.models import checkpoint, engines, exported, linear, loading, machine

    if labels and not spec.labels:
        raise ModelError(
            f"{spec.model} was identified without labels; identify it again with labels: true"
        )
    found = checkpoint.locate(spec.model, spec.revision)
    graph = exported.read_graph(found)
    if (weights := exported.hash_model(found)) != spec.weights_sha256:
        raise ModelError(
            f"{spec.model}: the weights changed (sha256 {spec.weights_sha256[:12]}… planned, "
            f"{weights[:12]}… found). "
            "Put the old weights back, or choose another `out`."
        )
    chosen = machine.resolve_device(device)
    engines.require(spec.engine, chosen, spec.precision)
    machine.require(chosen, spec.precision, "")
    k = top_k if labels else 0
    if graph:
        return exported.open_exported(found, graph, spec, vectors, k, chosen, threads)
    network = loading.load_network(
        found, labels, linear.open_head(spec, found, chosen) if labels else None
    )
    crash_point("model-loaded")
    if spec.engine == "torch":
        from vitray.models.torch_engine import TorchModel

        return TorchModel(
            network, spec, vectors, k, chosen, threads if chosen == "cpu" else 1, compiled
        )
    from vitray.models.graph import GraphModel, export_graph

    program = export_graph(network, spec, vectors, labels)
    if spec.engine == "onnx":
        from vitray.models import onnx_engine

        return GraphModel(
            onnx_engine.compile_graph(program, chosen),
            spec,
            vectors,
            k,
            threads if chosen == "cpu" else 1,
        )
    from vitray.models import openvino_engine

    run = openvino_engine.open_graph(openvino_engine.convert(program), spec.precision, threads)
    return GraphModel(run, spec, vectors, k, threads)
