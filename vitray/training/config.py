"""`TrainingConfig`: what a person writes for `vitray finetune`. Fields, defaults, validation. Knows
nothing of torch or Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from vitray.job import (
    FORMATS,
    Job,
    Location,
    Prefixes,
    Strings,
    Text,
    Urls,
    Written,
    distinct_labels,
    make_job,
    read_fields,
)

# of a training: what another machine may change without another result
FREE = ("out", "workers", "device", "save_steps", "accumulate", "gradient_checkpointing")
TAUGHT = {"distill", "temperature", "teacher_weight"}  # fields
RATES = {
    "head": 3e-3,
    "last": 3e-4,
    "lora": 1e-3,
    "full": 1e-4,
    "scratch": 1e-3,
}  # AdamW's peak where `lr` is not set


class TrainingConfig(Written):
    """One training: which images and labels, which model, what of it learns and how, where to."""

    source: Urls = Field(
        [], description="images, as in a job: URL, list, glob, range or prefix; local path or s3://"
    )
    dataset: Location | None = Field(
        None,
        description="instead of source: a finished dataset, its images or (probe) its embeddings",
    )
    teacher: Location | None = Field(
        None, description="a finished dataset of the teacher, joined by the bytes of the images"
    )
    teacher_model: Location | None = Field(
        None,
        description="instead of teacher: its checkpoint, which sees each image as the student "
        "does, "
        "cropped and mixed",
    )
    model: Location | None = Field(
        None, description="Hugging Face id, local or s3:// directory; a probe takes its dataset's"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    out: Location = Field(
        description="directory of the new checkpoint, local or s3://; `model:` takes it as it is"
    )
    format: Literal["auto", "tar", "parquet", "files", "manifest"] = Field(
        "auto", description="what the source holds"
    )
    image_column: str | None = Field(None, description="as in a job")
    key_column: str | None = Field(None, description="as in a job")
    image_member: str | None = Field(None, description="as in a job")
    allow: Prefixes = Field([], description="as in a job")
    formats: Strings = Field(list(FORMATS), description="image formats that are decoded")
    label: Text | None = Field(
        None,
        description="where an image's label is: folder (its directory's name, the default), a "
        "column, or "
        "a tar member's extension; "
        "of a dataset a column (default: label, the model's own)",
    )
    label_field: str | None = Field(
        None, description="the field that holds the label, where column or member is JSON"
    )
    label_table: Location | None = Field(
        None, description="CSV or Parquet with labels by key, joined to the images"
    )
    table_key: str = Field(
        "key", description="the column of label_table that holds the images' keys"
    )
    classes: Strings = Field(
        [],
        description="names of the classes in the order of the outputs (default: those seen, "
        "sorted)",
    )
    unlabelled: Literal["refuse", "skip"] = Field(
        "refuse", description="what to do when images have no label"
    )
    min_score: float = Field(
        0.0, description="dataset: only rows whose label has at least this score", ge=0, le=1
    )
    validation: float = Field(
        0.1, description="share held out, by a hash of each key; 0: none", ge=0, lt=1
    )
    train: Literal["probe", "head", "last", "lora", "full"] = Field(
        "head",
        description="what learns: a linear head on stored embeddings, the head, the last blocks "
        "and "
        "it, "
        "low-rank adapters, or all",
    )
    init: Literal["weights", "scratch"] = Field(
        "weights", description="scratch: random weights; config and processor suffice"
    )
    last: int = Field(1, description="train: last: how many blocks", ge=1)
    rank: int = Field(
        8, description="train: lora: rank of the adapters, which are merged in the end", ge=1
    )
    column: str | None = Field(
        None,
        description="vector column of dataset (probe) or teacher (embedding), where there are "
        "several",
    )
    distill: Literal["labels", "embedding"] = Field(
        "labels", description="what is learnt of the teacher: its scores or its vectors"
    )
    teacher_weight: float = Field(
        0.5, description="share of the teacher's loss beside that of the labels", ge=0, le=1
    )
    temperature: float = Field(2.0, description="distill: labels: softens both distributions", gt=0)
    epochs: int = Field(20, description="how often each image is seen", ge=1)
    batch_size: int = Field(64, description="images a step, over all workers", ge=1)
    accumulate: int = Field(
        1, description="parts in which a worker computes its share of a step, to save memory", ge=1
    )
    lr: float | None = Field(
        None, description=f"peak learning rate (default by what learns: {RATES})", gt=0
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="from the peak down to 0"
    )
    warmup: float = Field(0.1, description="share of the steps in which the rate rises", ge=0, lt=1)
    weight_decay: float = Field(0.05, description="AdamW's, not of biases and norms", ge=0)
    layer_decay: float = Field(
        1.0,
        description="factor of the learning rate from each block to the one below it",
        gt=0,
        le=1,
    )
    clip: float = Field(1.0, description="largest norm of the gradient", gt=0, allow_inf_nan=True)
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes count as much as common ones"
    )
    label_smoothing: float = Field(
        0.0, description="share of a label spread over all classes", ge=0, lt=1
    )
    flip: bool = Field(True, description="mirror half of the images")
    crop: float = Field(
        0.5,
        description="least share of an image's area in a random resized crop; 1: none",
        gt=0,
        le=1,
    )
    mixup: float = Field(0.0, description="alpha of mixup; 0: none", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 or fp16 on a GPU, fp32 on a CPU"
    )
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        "auto", description="where it trains"
    )
    workers: int = Field(
        1, description="more than 1: Ray Train workers, a GPU each where there are GPUs", ge=1
    )
    metric: Literal["accuracy", "loss"] = Field(
        "accuracy", description="validation figure that chooses the best epoch"
    )
    patience: int | None = Field(
        None, description="stop after so many epochs without a better one", ge=1
    )
    save_steps: int | None = Field(
        None, description="steps between checkpoints, besides one an epoch", ge=1
    )
    seed: int = Field(0, description="decides weights, batches and augmentations", ge=0)

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        return distinct_labels(value) if value else value

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
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
        for name, needed in (("last", "last"), ("rank", "lora")):
            if name in self.model_fields_set and self.train != needed:
                raise ValueError(f"{name} is of train: {needed}, and train is {self.train}")
        if not (self.teacher or self.teacher_model) and (odd := self.model_fields_set & TAUGHT):
            raise ValueError(f"{', '.join(sorted(odd))}: give `teacher` or `teacher_model`, too")
        if self.init == "scratch" and self.train != "full":
            raise ValueError(
                "init: scratch needs train: full, since nothing of random weights is worth keeping"
            )
        if self.batch_size % (self.workers * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into {self.workers} workers x "
                f"{self.accumulate} parts"
            )
        if self.patience and not self.validation:
            raise ValueError("patience needs a validation share")
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return (
            self.lr
            if self.lr is not None
            else RATES["scratch" if self.init == "scratch" else self.train]
        )

    @property
    def label_at(self) -> str:
        return self.label or ("label" if self.from_dataset or self.label_table else "folder")

    @property
    def label_place(self) -> str:
        """Where labels are looked for, for messages."""
        place = self.label_at + (f", field {self.label_field}" if self.label_field else "")
        return (
            f"{place} of {self.label_table}, by its column {self.table_key}"
            if self.label_table
            else place
        )

    @property
    def from_dataset(self) -> str | None:
        """The dataset whose images or embeddings are learnt from."""
        return None if self.source else self.dataset or self.teacher

    def source_job(self) -> Job:
        """The job that lists and reads the source, with the label kept."""
        keep = [] if self.label_table or self.label_at == "folder" else [self.label_at]
        fields = {
            name: getattr(self, name)
            for name in ("source", "model", "out", "format", "allow", "formats")
        }
        fields |= {
            name: getattr(self, name) for name in ("image_column", "key_column", "image_member")
        }
        return make_job({**fields, "keep": keep})

    def deciding(self) -> dict[str, object]:
        """Every field that decides the numbers."""
        return self.model_dump(mode="json", exclude=set(FREE))


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainingConfig:
    """The config of a YAML or JSON file, with overrides from the command line on top."""
    return TrainingConfig(**{**read_fields(path), **(overrides or {})})
