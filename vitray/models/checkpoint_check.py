"""What a checkpoint is, in a fraction of a second: for commands that compute nothing.

`identify` imports torch through transformers, which takes seconds, and reads all weights. Here the
plain cases are read from the JSON files and from the headers of the weights alone. Where only
transformers can tell, `identify` is asked, still without the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from vitray.job import Job
from vitray.models.checkpoint import (
    FAMILIES,
    Checkpoint,
    VisionConfig,
    config_fields,
    score_function_of,
    weight_bytes,
)
from vitray.models.checkpoint_store import outlined
from vitray.models.engines import (
    MODULES,
    PRECISIONS,
    require_engine,
    require_filter,
    require_installed,
    require_pixels,
    require_precision,
)
from vitray.models.exported import Export, computed_bytes, hash_model, read_export, read_graph
from vitray.models.labels import WITH_TEXT_TOWER, labelled_by_own_head, tokenise
from vitray.models.linear_head import labelled_by_head
from vitray.models.machine import require_decoder, require_hardware, resolve_device
from vitray.models.pixels import PLAIN, declared_processor
from vitray.models.resolve import identify, vector_columns, with_label_names
from vitray.schema import TORCH_FILTERS, ModelSpec, PixelSpec, VectorColumn

CHEAP_BYTES = 1 << 30  # weights that are hashed in a second
PLACEHOLDERS = {"precision": "fp32", "engine": "torch", "batch_size": 1}  # in place of `auto`
PROCESSOR_NAME = re.compile(r"(\w+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
TOWER_FIELDS = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
WITHOUT_CROP = ("ViT", "Siglip")  # processors that crop only where their file says so
NOT_HASHED = "0" * 64


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model that a run would accept, as far as this was looked at.

    spec: `auto` values of the job are placeholders. is_hashed: whether the weights were read.
    """

    spec: ModelSpec
    vectors: list[VectorColumn]
    is_hashed: bool


def check_model(job: Job, known: ModelSpec | None = None, *, reads_weights: bool) -> CheckedModel:
    """The job's model, without opening it.

    Weights are not fetched. They are read only for their hash: to compare it with `known`, the
    model of the dataset, or with that of a head. reads_weights: also if they are large.

    Raises ModelError and JobError as `identify` does, but for what this machine lacks.
    """
    job = with_label_names(job)
    with outlined(job.model, job.revision, whole=reads_weights or job.head is not None) as outline:
        checkpoint = outline.checkpoint
        fixed = _without_auto(job, read_graph(checkpoint))
        weights = NOT_HASHED if known is None else known.weights_sha256
        is_asked = known is not None or reads_weights or job.head is not None
        is_hashed = outline.has_weights and is_asked
        if is_hashed and not (reads_weights or job.head):
            is_hashed = computed_bytes(checkpoint) <= CHEAP_BYTES
        if is_hashed:
            weights = hash_model(checkpoint)
        spec = quick_spec(fixed, checkpoint, weights)
        if spec is None:
            spec = identify(fixed, runs_here=False, checkpoint=checkpoint, weights_sha256=weights)
    return CheckedModel(spec, vector_columns(job, spec), is_hashed)


def _without_auto(job: Job, export: Export | None) -> Job:
    """The job with PLACEHOLDERS in place of `auto`. The engine of an export is known."""
    fields = PLACEHOLDERS if export is None else {**PLACEHOLDERS, "engine": "auto"}
    return job.model_copy(
        update={name: value for name, value in fields.items() if getattr(job, name) == "auto"}
    )


def possible_specs(job: Job, spec: ModelSpec) -> list[ModelSpec]:
    """The spec with every engine and precision that `auto` may mean."""
    engines = ["torch", *MODULES] if job.engine == "auto" else [spec.engine]
    precisions = ["fp32", "bf16", "fp16"] if job.precision == "auto" else [spec.precision]
    return [
        replace(spec, engine=engine, precision=precision)
        for engine, precision in product(engines, precisions)
        if precision in PRECISIONS.get(engine, (precision,))
    ]


def require_machine(job: Job, thoroughly: bool = False) -> None:
    """Raise ModelError where this machine lacks what the job names.

    Imports torch for a job that names hardware. thoroughly: for any other engine than torch, too.
    """
    if job.engine != "auto":
        require_precision(job.engine, job.precision)
    is_graph = job.engine in MODULES
    if is_graph and not thoroughly:
        require_installed(job.engine)
    names_hardware = (
        job.device not in ("auto", "cpu")
        or job.precision == "fp8"
        or job.decode in ("gpu", "hybrid")
    )
    if not (names_hardware or (is_graph and thoroughly)):
        return
    device = resolve_device(job.device)
    require_hardware(device, job.precision)
    require_decoder(device, job.decode)
    if is_graph:
        require_engine(job.engine, device, job.precision)


def quick_spec(job: Job, checkpoint: Checkpoint, weights_sha256: str) -> ModelSpec | None:
    """What `identify` would return for a job without `auto`; None where only it can tell.

    Raises what `identify` raises, for what is seen here.
    """
    if read_export(checkpoint) is not None:
        return None
    config = _quick_config(config_fields(checkpoint))
    pixels = _quick_pixels(checkpoint)
    if config is None or pixels is None or pixels.shape != config.image_size:
        return None
    spec = ModelSpec(
        model=checkpoint.model,
        revision=checkpoint.revision,
        weights_sha256=weights_sha256,
        family=config.family,
        labels=(),
        multi_label=config.hf.problem_type == "multi_label_classification",
        dimension=config.dimension,
        layers=config.layers,
        prefix_tokens=config.prefix_tokens,
        has_cls=config.prefix_tokens > 0,
        pixels=pixels,
        precision=job.precision,
        engine=job.engine,
        batch_size=int(job.batch_size),
    )
    weight_bytes(checkpoint)  # raises ModelError where they are missing
    if job.head is not None:
        spec = labelled_by_head(spec, job.head)
    elif isinstance(job.labels, list):
        if config.family in WITH_TEXT_TOWER:
            return None
        tokenise(checkpoint, config, job.labels, job.prompts)  # raises: there is no text tower
    elif job.labelled:
        spec = labelled_by_own_head(spec, checkpoint, config)
    require_pixels(spec.engine, job.decode)
    require_filter(spec, job.decode)
    return spec


def _quick_config(fields: Mapping[str, Any]) -> VisionConfig | None:
    """The vision tower, where config.json states all of it; None where a default decides."""
    vision = fields.get("vision_config", fields)
    names = fields.get("id2label")
    if not isinstance(vision, dict) or not isinstance(names, dict):
        return None
    sizes = [vision[name] for name in TOWER_FIELDS if type(vision.get(name)) is int]
    if len(sizes) < len(TOWER_FIELDS) or not all(str(number).isdecimal() for number in names):
        return None
    family = fields["model_type"]
    registers: Any = vision.get("num_register_tokens", None if family.endswith("registers") else 0)
    is_plain = (
        type(registers) is int
        and vision.get("num_channels", 3) == 3
        and fields.get("num_labels", len(names)) == len(names)
        and fields.get("problem_type") in PROBLEM_TYPES
    )
    if not is_plain:
        return None
    stand_in = SimpleNamespace(
        id2label=names, problem_type=fields.get("problem_type"), num_labels=len(names)
    )
    dimension, layers, side, patch_size = sizes
    return VisionConfig(
        family=family,
        dimension=dimension,
        layers=layers,
        prefix_tokens=FAMILIES[family] + registers,
        image_size=(side, side),
        patch_size=patch_size,
        score_function=score_function_of(stand_in),
        hf=stand_in,
    )


def _quick_pixels(checkpoint: Checkpoint) -> PixelSpec | None:
    """The image processor, where its file states all of it; None where a default decides."""
    _, fields = declared_processor(checkpoint)
    name = fields.get("image_processor_type")
    match = PROCESSOR_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] not in PLAIN or fields.get("do_pad"):
        return None
    crops = fields.get("do_center_crop", False if match[1] in WITHOUT_CROP else None)
    size = _sides_of(fields.get("size"))
    crop = _sides_of(fields.get("crop_size")) if crops else None
    mean = _channels(fields.get("image_mean"))
    std = _channels(fields.get("image_std"))
    rescale, resample = fields.get("rescale_factor"), fields.get("resample")
    if not all(fields.get(flag) is True for flag in ("do_resize", "do_rescale", "do_normalize")):
        return None
    if type(crops) is not bool or type(rescale) is not float or not 0 < rescale < 1:
        return None
    if type(resample) is not int or resample not in TORCH_FILTERS:
        return None
    if size is None or mean is None or std is None or 0 in std:
        return None
    if not crops:
        return PixelSpec(size, resample, None, rescale, mean, std) if len(size) == 2 else None
    if crop is None or len(crop) != 2 or crop[0] > size[0] or crop[1] > size[-1]:
        return None
    return PixelSpec(size, resample, (crop[0], crop[1]), rescale, mean, std)


def _sides_of(size: Any) -> tuple[int, ...] | None:
    """(height, width) or (shortest edge,); None for anything else."""
    if not isinstance(size, dict) or not all(type(n) is int and n > 0 for n in size.values()):
        return None
    if size.keys() == {"height", "width"}:
        return (size["height"], size["width"])
    return (size["shortest_edge"],) if size.keys() == {"shortest_edge"} else None


def _channels(values: Any) -> tuple[float, float, float] | None:
    """One number for each of red, green and blue; None for anything else."""
    if not isinstance(values, list) or len(values) != 3:
        return None
    if not all(type(value) in (int, float) for value in values):
        return None
    red, green, blue = map(float, values)
    return (red, green, blue)
