"""`TrainingConfig`: the fields of a `vitray finetune` file, their defaults and their validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vitray.errors import count
from vitray.job import (
    FORMATS,
    Job,
    Location,
    Prefixes,
    Strings,
    Text,
    Urls,
    UserConfig,
    distinct_labels,
    make_job,
    read_fields,
)

# fields that may change between two calls for one `out`: they do not decide the numbers
FREE_FIELDS = ("out", "workers", "device", "save_steps", "accumulate", "gradient_checkpointing")
TEACHER_FIELDS = {"distill", "temperature", "teacher_weight"}
# AdamW's peak learning rate where `lr` is not set, by what learns
RATES = {"head": 3e-3, "last": 3e-4, "lora": 1e-3, "full": 1e-4, "scratch": 1e-3}
_RATES_TEXT = ", ".join(f"`{name}` {rate:g}" for name, rate in RATES.items())


class TrainingConfig(UserConfig):
    """One training: images and labels, the model, what learns and how, and the output."""

    source: Urls = Field(
        [], description="images, as in a job: URL, list, glob, range or prefix; local path or s3://"
    )
    dataset: Location | None = Field(
        None,
        description="instead of source: a finished dataset, for its images or (`train: probe`) its "
        "embeddings",
    )
    teacher: Location | None = Field(
        None, description="a finished dataset of the teacher, joined by the bytes of the images"
    )
    teacher_model: Location | None = Field(
        None,
        description="instead of teacher: its checkpoint, which sees the same cropped and mixed "
        "images as the student",
    )
    model: Location | None = Field(
        None,
        description="Hugging Face id, local or s3:// directory; `train: probe` uses its dataset's",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    out: Location = Field(
        description="directory of the new checkpoint, local or s3://; use it as a `model:`"
    )
    format: Literal["auto", "tar", "parquet", "files", "manifest"] = Field(
        "auto", description="what the source holds"
    )
    image_column: str | None = Field(None, description="as in a job")
    key_column: str | None = Field(None, description="as in a job")
    image_member: str | None = Field(None, description="as in a job")
    allow: Prefixes = Field([], description="as in a job")
    formats: Strings = Field(list(FORMATS), description="image formats to decode")
    label: Text | None = Field(
        None,
        description="where an image's label is: a column, the extension of a tar member, or "
        "`folder` (the default), the name of its directory. Required with `dataset`: a "
        "passthrough column, `folder`, or `label` for what the dataset's own model chose",
    )
    label_field: str | None = Field(
        None, description="the field that holds the label, if the column or member is JSON"
    )
    label_table: Location | None = Field(
        None, description="CSV or Parquet with labels by key, joined to the images"
    )
    table_key: str = Field(
        "key", description="the column of label_table that holds the keys of the images"
    )
    classes: Strings = Field(
        [],
        description="names of the classes, in the order of the outputs (default: those of the "
        "images, sorted)",
    )
    unlabelled: Literal["refuse", "skip"] = Field(
        "refuse", description="what to do if images have no label"
    )
    min_score: float = Field(
        0.0,
        description="with `dataset`: use only rows whose label has at least this score",
        ge=0,
        le=1,
    )
    validation: float = Field(
        0.1, description="share of images to hold out, by a hash of the key; 0: none", ge=0, lt=1
    )
    train: Literal["probe", "head", "last", "lora", "full"] = Field(
        "head",
        description="what learns. `probe`: a linear head on stored embeddings. `head`: the head. "
        "`last`: the last blocks and the head. `lora`: low-rank adapters. `full`: everything",
    )
    init: Literal["weights", "scratch"] = Field(
        "weights", description="`scratch`: random weights; `model` needs no weight file"
    )
    last: int = Field(1, description="`train: last`: how many blocks", ge=1)
    rank: int = Field(
        8, description="`train: lora`: rank of the adapters, which are merged at the end", ge=1
    )
    column: str | None = Field(
        None,
        description="vector column of dataset (`train: probe`) or teacher (`distill: embedding`), "
        "if it has several",
    )
    distill: Literal["labels", "embedding"] = Field(
        "labels",
        description="what to learn from the teacher. `labels`: its scores. "
        "`embedding`: its vectors",
    )
    teacher_weight: float = Field(
        0.5, description="share of the teacher's loss; the rest is that of the labels", ge=0, le=1
    )
    temperature: float = Field(
        2.0, description="`distill: labels`: softens both distributions", gt=0
    )
    epochs: int = Field(20, description="passes over all images", ge=1)
    batch_size: int = Field(64, description="images per step, over all workers", ge=1)
    accumulate: int = Field(
        1, description="parts in which a worker computes its share of a step, to save memory", ge=1
    )
    lr: float | None = Field(
        None, description=f"peak learning rate (default by what learns: {_RATES_TEXT})", gt=0
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls from its peak; `constant`: not at all"
    )
    warmup: float = Field(0.1, description="share of steps in which the rate rises", ge=0, lt=1)
    weight_decay: float = Field(0.05, description="AdamW's, except for biases and norms", ge=0)
    layer_decay: float = Field(
        1.0,
        description="factor of the learning rate from each block to the one below it",
        gt=0,
        le=1,
    )
    clip: float = Field(1.0, description="largest norm of the gradient", gt=0, allow_inf_nan=True)
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="`balanced`: rare classes count as much as common ones"
    )
    label_smoothing: float = Field(
        0.0, description="share of a label spread over all classes", ge=0, lt=1
    )
    flip: bool = Field(True, description="mirror half of the images")
    crop: float = Field(
        0.5,
        description="least share of an image's area in a random resized crop; 1: no crop",
        gt=0,
        le=1,
    )
    mixup: float = Field(0.0, description="alpha of mixup; 0: none", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="`auto`: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="where to train"
    )
    workers: int = Field(
        1, description="more than 1: Ray Train workers, with a GPU each if there are GPUs", ge=1
    )
    metric: Literal["accuracy", "loss"] = Field(
        "accuracy", description="figure of the held-out images that chooses the best epoch"
    )
    patience: int | None = Field(
        None, description="stop after this many epochs without a better one", ge=1
    )
    save_steps: int | None = Field(
        None, description="steps between checkpoints; there is one per epoch, too", ge=1
    )
    seed: int = Field(0, description="decides random weights, batches and augmentations", ge=0)

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        return distinct_labels(value) if value else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        self._require_inputs()
        self._require_fitting_fields()
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of "
                f"{count(self.workers, 'worker')} x {count(self.accumulate, 'part')}"
            )
        if self.patience and not self.validation:
            raise ValueError("patience needs a validation share")
        return self

    def _require_inputs(self) -> None:
        """Raises ValueError for images, a teacher or a model that is missing or named twice."""
        if self.source and self.dataset:
            raise ValueError("source and dataset: give one of them")
        if self.teacher and self.teacher_model:
            raise ValueError("teacher and teacher_model: give one of them")
        if self.train == "probe" and (not self.dataset or self.teacher or self.teacher_model):
            raise ValueError(
                "train: probe learns from stored embeddings: give `dataset`, made by vitray run, "
                "and no source or teacher"
            )
        if not (self.source or self.dataset or self.teacher):
            raise ValueError("`source` is missing: images, as in a job, or `dataset`")
        if self.train != "probe" and self.model is None:
            raise ValueError(
                "`model` is missing: Hugging Face id, local directory, or s3:// directory"
            )

    def _require_fitting_fields(self) -> None:
        """Raises ValueError for a field that has no effect on this kind of training."""
        for name, needed in (("last", "last"), ("rank", "lora")):
            if name in self.model_fields_set and self.train != needed:
                raise ValueError(f"{name} is for train: {needed}, and train is {self.train}")
        unused = self.model_fields_set & TEACHER_FIELDS
        if unused and not (self.teacher or self.teacher_model):
            raise ValueError(f"{', '.join(sorted(unused))}: give `teacher` or `teacher_model`, too")
        if self.init == "scratch" and self.train != "full":
            raise ValueError(
                "init: scratch needs train: full, since random weights that do not learn are "
                "useless"
            )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        return RATES["scratch" if self.init == "scratch" else self.train]

    @property
    def label_column(self) -> str:
        """Where the label is: `folder`, or the name of a column or of a tar member's extension."""
        return self.label or ("label" if self.from_dataset or self.label_table else "folder")

    @property
    def label_location(self) -> str:
        """Where labels are looked up, for messages."""
        location = self.label_column
        if self.label_field:
            location += f", field {self.label_field}"
        if self.label_table:
            location += f" of {self.label_table}, by its column {self.table_key}"
        return location

    @property
    def from_dataset(self) -> str | None:
        """The dataset whose images or embeddings are used, if there is no `source`."""
        return None if self.source else self.dataset or self.teacher

    def source_job(self) -> Job:
        """The job that lists and reads the source, with the label as a passthrough column."""
        in_column = not self.label_table and self.label_column != "folder"
        names = ("source", "model", "out", "format", "allow", "formats")
        fields = {name: getattr(self, name) for name in names}
        for name in ("image_column", "key_column", "image_member"):
            fields[name] = getattr(self, name)
        return make_job({**fields, "keep": [self.label_column] if in_column else []})

    def deciding(self) -> dict[str, object]:
        """Every field that decides the numbers."""
        return self.model_dump(mode="json", exclude=set(FREE_FIELDS))


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """The TrainingConfig of a YAML or JSON file. `overrides` replace its fields."""
    return make_config({**read_fields(path), **(overrides or {})})


def make_config(fields: dict[str, Any]) -> TrainingConfig:
    """The TrainingConfig of these fields. Raises JobError."""
    return TrainingConfig(**fields)
