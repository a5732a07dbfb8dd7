"""Which labels a run gives, and by what: the checkpoint's own head, words that its text tower
reads, or a linear head. Needs no torch.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from vitray.errors import JobError, ModelError, VitrayError, one_line
from vitray.job import Job, distinct_labels
from vitray.models import checkpoint, text
from vitray.schema import ModelSpec, ScoreFunction, VectorColumn
from vitray.storage import absolute, read

if TYPE_CHECKING:
    from vitray.models.head import Head

log = logging.getLogger(__name__)


def with_label_names(job: Job) -> Job:
    """The job with its file of labels read: one a line, UTF-8. Raises JobError for one that cannot
    be read or says a label twice.
    """
    if not isinstance(job.labels, str):
        return job
    url = absolute(job.labels)
    try:
        names = distinct_labels(read(url).decode("utf-8-sig").strip().splitlines())
    except (VitrayError, OSError) as error:
        raise JobError(
            f"`labels`: {url} cannot be read ({one_line(error)}); for labels in the job write "
            f"[cat, dog]."
        ) from error
    except ValueError as error:
        raise JobError(
            f"`labels`: {url}: {one_line(error)}; write one label a line, in UTF-8."
        ) from error
    return job.model_copy(update={"labels": names})


def labelled(
    job: Job, spec: ModelSpec, found: checkpoint.Checkpoint, config: checkpoint.VisionConfig
) -> ModelSpec:
    """The spec with the labels that the job asks for. Raises ModelError when the checkpoint cannot
    give them.
    """
    spec = _labelled(job, spec, found, config)
    if len(spec.labels) == 1 and spec.score_function is ScoreFunction.SOFTMAX:
        log.warning(
            "%s: %r is the only label, so its score is 1.0 for every image: a softmax compares "
            "labels. Add a label for all "
            "other images.",
            spec.head or spec.model,
            spec.labels[0],
        )
    return spec


def _labelled(
    job: Job, spec: ModelSpec, found: checkpoint.Checkpoint, config: checkpoint.VisionConfig
) -> ModelSpec:
    if job.head is not None:
        head = read_own_head(absolute(job.head), spec)
        return replace(
            spec,
            labels=head.labels,
            multi_label=False,
            head=absolute(job.head),
            head_sha256=head.sha256(),
        )
    if isinstance(job.labels, list):
        texts = text.tokens(found, config, job.labels, job.prompts)
        return replace(
            spec,
            labels=tuple(job.labels),
            multi_label=config.family == "siglip",
            prompts=tuple(job.prompts),
            text_sha256=texts.sha256(),
        )
    if not job.labelled:
        return spec
    labels = checkpoint.read_labels(found, config)
    if not labels:
        words = (
            " It labels with words of yours: labels: [cat, dog]."
            if config.family in text.FAMILIES
            else ""
        )
        raise ModelError(
            f"{found.model} has no trained classification head, so it cannot label; set labels: "
            f"false to keep embeddings only, "
            f"or choose a checkpoint with a head.{words}"
        )
    regression = config.score_function is ScoreFunction.NONE
    return replace(spec, labels=labels, multi_label=config.multi_label, regression=regression)


def read_own_head(url: str, spec: ModelSpec) -> Head:
    """The head in a directory, if it is for these weights and for a vector that they give; else
    ModelError.
    """
    from vitray.models.head import read_head

    head = read_head(url)
    if head.weights_sha256 != spec.weights_sha256:
        raise ModelError(
            f"head {url} is for {head.model} (weights {head.weights_sha256[:12]}…), and the "
            f"embeddings are of {spec.model} "
            f"({spec.weights_sha256[:12]}…). Take the model it was made for, or make a head for "
            f"this one (vitray finetune)."
        )
    if head.weight.shape[1] != spec.dimension:
        raise ModelError(
            f"head {url} takes {head.weight.shape[1]} values, and an embedding of {spec.model} "
            f"has {spec.dimension}."
        )
    require_vector(spec, head.layer, head.pool)
    return head


def head_column(head: Head, spec: ModelSpec) -> VectorColumn:
    """The vector that the head reads."""
    return VectorColumn("", spec.dimension, head.layer, head.pool, head.normalize, "float32")


def require_vector(spec: ModelSpec, layer: int | None, pool: str) -> None:
    """Raises ModelError for a layer or a token that the model does not have."""
    if layer is not None and not 1 <= layer <= spec.layers:
        raise ModelError(f"{spec.model} has no layer {layer}: layers are 1..{spec.layers} or last")
    if pool == "cls" and not spec.has_cls:
        raise ModelError(
            f"{spec.model} is a {spec.family} model, which has no CLS token; use pool: mean"
        )
