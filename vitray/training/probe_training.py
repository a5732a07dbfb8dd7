"""`train: probe`: a linear probe on the stored embeddings of a dataset.

No image is read but those that the page shows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vitray.dataset import Dataset, choose_vector, matrix_of, require_complete
from vitray.errors import ModelError, VitrayError, one_line
from vitray.evaluation.pictures import pictures_of, rows_of
from vitray.models import checkpoint_store
from vitray.models.checkpoint import Checkpoint
from vitray.models.exported import hash_model, read_graph
from vitray.models.linear_head import Head
from vitray.models.loading import load_trainable
from vitray.training import outputs
from vitray.training.activity import Activity, Phase, Watch, unwatched
from vitray.training.config import TrainingConfig
from vitray.training.examples import NO_LABEL, is_held_out
from vitray.training.fitting import class_weights
from vitray.training.labelled_source import ImageId, LabelledSource, LabelledVectors
from vitray.training.labels import choose_classes, class_ids, require_both_sides, require_labels
from vitray.training.linear_probe import LabelledRows, LinearProbe, evaluate_head, fit_linear_probe
from vitray.training.out_folder import require_same
from vitray.training.outcome import HeldOut, TrainingOutcome, TrainingResult, shown_images


@dataclass(frozen=True)
class _Data:
    """Both sides of the split. skipped: key, reason and message of rows that are not used."""

    classes: tuple[str, ...]
    train: LabelledRows
    held_out: LabelledRows
    held_out_keys: list[str]
    held_out_images: list[ImageId]
    skipped: list[dict[str, str]]


def train_linear_probe(config: TrainingConfig, watch: Watch = unwatched) -> TrainingResult:
    """Fit the probe and write OUT. Raises JobError, ModelError and StorageError."""
    started = time.monotonic()
    watch(Activity(Phase.READING_VECTORS))
    dataset = require_complete(str(config.dataset))
    vector = choose_vector(dataset, config.column)
    source = LabelledSource(config)
    labelled = source.vectors(vector.column)
    watch(Activity(Phase.READING_MODEL))
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
        data.train, data.held_out, weights, config.label_smoothing, config.metric, watch
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
    watch(Activity(Phase.READING_PICTURES))
    outcome = _outcome(source, base, data, probe)
    watch(Activity(Phase.WRITING))
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
    images = [image for image, (_, label) in zip(labelled.images, labelled.pairs) if label]
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
        held_out_keys=[key for (key, _), is_out in zip(pairs, is_held) if is_out],
        held_out_images=[image for image, is_out in zip(images, is_held) if is_out],
        skipped=skipped + labelled.undecodable,
    )


def _outcome(
    source: LabelledSource, base: Checkpoint, data: _Data, probe: LinearProbe
) -> TrainingOutcome:
    held_out = None
    notes = list[str]()
    if len(data.held_out.ids) > 0:
        evaluation = evaluate_head(probe.weight, probe.bias, data.held_out)
        shown = shown_images(data.held_out.ids, evaluation).all
        pictures, notes = _pictures(source, {n: data.held_out_images[n] for n in shown})
        held_out = HeldOut(data.held_out_keys, data.held_out.ids, evaluation, pictures)
    return TrainingOutcome(
        config=source.config,
        base=base,
        classes=data.classes,
        records=probe.records,
        skipped=data.skipped,
        figures={name: x for name, x in probe.best.items() if name.startswith("validation")},
        held_out=held_out,
        chosen=probe.best,
        notes=notes,
    )


def _pictures(
    source: LabelledSource, images: dict[int, ImageId]
) -> tuple[dict[int, str], list[str]]:
    """The pictures of the page, read from the dataset's source; and why some are missing.

    images: where each of them is, by its number among the held-out images. A source that is gone
    leaves the page without pictures: the probe needs none.
    """
    assert source.dataset is not None
    try:
        shards = {shard.id: shard for shard in source.shards}
    except (VitrayError, OSError) as error:
        return {}, [f"The source cannot be listed, so there are no pictures: {one_line(error)}"]
    rows = rows_of(source.dataset, images.values(), ["content_hash"])
    by_image, notes = pictures_of(source.dataset, shards, rows)
    return {n: by_image[image] for n, image in images.items() if image in by_image}, notes


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
