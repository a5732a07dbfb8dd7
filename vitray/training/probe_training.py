"""`train: probe`: a linear probe on the stored embeddings of a dataset. No image is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitray.dataset import Dataset, choose_vector, matrix_of, require_complete
from vitray.errors import ModelError
from vitray.models import checkpoint_store
from vitray.models.checkpoint import Checkpoint
from vitray.models.exported import hash_model, read_graph
from vitray.models.linear_head import Head
from vitray.models.loading import load_trainable
from vitray.training import outputs
from vitray.training.config import TrainingConfig
from vitray.training.examples import NO_LABEL, is_held_out
from vitray.training.fitting import class_weights
from vitray.training.labelled_source import LabelledSource, LabelledVectors
from vitray.training.labels import choose_classes, class_ids, require_both_sides, require_labels
from vitray.training.linear_probe import LabelledRows, LinearProbe, evaluate_head, fit_linear_probe
from vitray.training.out_folder import require_same
from vitray.training.outcome import HeldOut, TrainingOutcome, TrainingResult


@dataclass(frozen=True)
class _Data:
    """Both sides of the split. skipped: key, reason and message of rows that are not used."""

    classes: tuple[str, ...]
    train: LabelledRows
    held_out: LabelledRows
    held_out_keys: list[str]
    skipped: list[dict[str, str]]


def train_linear_probe(config: TrainingConfig) -> TrainingResult:
    """Fit the probe and write OUT. Raises JobError, ModelError and StorageError."""
    started = time.monotonic()
    dataset = require_complete(str(config.dataset))
    vector = choose_vector(dataset, config.column)
    labelled = LabelledSource(config).vectors(vector.column)
    base = _base(config, dataset)
    data = _split(config, labelled)
    inputs = {
        "weights": dataset.spec.weights_sha256,
        "data": dataset.fingerprint,
        "class_names": list(data.classes),
        "rows": len(data.train.ids) + len(data.held_out.ids),
    }
    require_same(config, inputs)
    weights = class_weights(config, data.train.ids, len(data.classes))
    probe = fit_linear_probe(
        data.train, data.held_out, weights, config.label_smoothing, config.metric
    )
    head = Head(
        labels=data.classes,
        weight=probe.weight,
        bias=probe.bias,
        layer=vector.layer,
        pool=vector.pool,
        normalize=vector.normalize,
        model=base.model,
        weights_sha256=dataset.spec.weights_sha256,
    )
    module = _with_head(config, base, head, dataset.spec.family)
    outcome = _outcome(config, base, data, probe)
    outputs.write(outcome, module, head)
    return outcome.result(
        images=len(data.train.ids),
        epochs=1,
        seconds=time.monotonic() - started,
        is_model=module is not None,
    )


def _base(config: TrainingConfig, dataset: Dataset) -> Checkpoint:
    """The model of the dataset. Raises ModelError if `model` names another one."""
    spec = dataset.spec
    if config.model:
        base = checkpoint_store.locate(config.model, config.revision)
    else:
        base = checkpoint_store.locate(spec.model, spec.revision)
    if hash_model(base) != spec.weights_sha256:
        raise ModelError(
            f"{base.model} is not the model of {dataset.out}: its weights differ. "
            "Leave `model` out, or make a new dataset."
        )
    return base


def _split(config: TrainingConfig, labelled: LabelledVectors) -> _Data:
    """Raises JobError for missing or unknown labels, and for a side without enough rows."""
    require_labels(config, labelled.pairs)
    pairs = [(key, label) for key, label in labelled.pairs if label is not None]
    classes = choose_classes(config, {label for _, label in pairs})
    ids = class_ids(pairs, classes)
    has_label = np.array([label is not None for _, label in labelled.pairs], bool)
    vectors = matrix_of(labelled.vectors)[has_label].astype(np.float32)
    is_held = np.array([is_held_out(key, config.validation) for key, _ in pairs], bool)
    require_both_sides(config, ids[~is_held], ids[is_held])
    unlabelled = [key for key, label in labelled.pairs if label is None]
    skipped = [{"key": key, "reason": NO_LABEL, "message": "skipped"} for key in unlabelled]
    return _Data(
        classes=classes,
        train=LabelledRows(vectors[~is_held], ids[~is_held]),
        held_out=LabelledRows(vectors[is_held], ids[is_held]),
        held_out_keys=[key for key, _ in pairs if is_held_out(key, config.validation)],
        skipped=skipped + labelled.undecodable,
    )


def _outcome(
    config: TrainingConfig, base: Checkpoint, data: _Data, probe: LinearProbe
) -> TrainingOutcome:
    held_out = None
    if len(data.held_out.ids) > 0:
        evaluation = evaluate_head(probe.weight, probe.bias, data.held_out)
        held_out = HeldOut(data.held_out_keys, data.held_out.ids, evaluation, pixels=None)
    return TrainingOutcome(
        config=config,
        base=base,
        classes=data.classes,
        records=probe.records,
        skipped=data.skipped,
        figures={name: x for name, x in probe.best.items() if name.startswith("validation")},
        held_out=held_out,
    )


def _with_head(config: TrainingConfig, base: Checkpoint, head: Head, family: str) -> Any | None:
    """The whole module with this head; None if its own head reads another vector.

    The head of ViT and DeiT reads CLS after the final LayerNorm. An export has no module.
    """
    is_own_vector = (head.layer, head.pool, head.normalize) == (None, "cls", False)
    if family not in ("vit", "deit") or not is_own_vector or read_graph(base):
        return None
    module = load_trainable(base, head.labels, config.seed, scratch=False).module
    with torch.no_grad():
        module.classifier.weight.copy_(torch.from_numpy(head.weight))
        module.classifier.bias.copy_(torch.from_numpy(head.bias))
    return module
