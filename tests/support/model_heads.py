"""Checkpoints of each kind of head, and datasets with given scores."""

from __future__ import annotations

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from vitray.models import Predictions
from vitray.schema import ModelSpec

IMAGES = 5

ONE = {"num_labels": 1}
ONE_OF_MANY = {"num_labels": 1, "problem_type": "multi_label_classification"}
VALUE = {"num_labels": 1, "problem_type": "regression"}
VALUES = {"num_labels": 3, "problem_type": "regression"}
CLASSES = {"num_labels": 3}
TAGS = {"num_labels": 3, "problem_type": "multi_label_classification"}


def of_pipeline(model: str, pixels: np.ndarray) -> list[list[tuple[str, float]]]:
    """Labels and scores of each image, best first, by transformers alone."""
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    classify = pipeline(
        "image-classification", model=model, image_processor=processor, device="cpu"
    )
    answers = classify([Image.fromarray(image) for image in pixels])
    return [[(one["label"], one["score"]) for one in answer] for answer in answers]


def require_pipeline(found: Predictions, spec: ModelSpec, model: str, pixels: np.ndarray) -> None:
    expected = of_pipeline(model, pixels)
    assert [[spec.labels[i] for i in ids] for ids in found.ids] == [
        [label for label, _ in one] for one in expected
    ]
    np.testing.assert_allclose(
        found.scores, [[score for _, score in one] for one in expected], rtol=1e-4, atol=1e-5
    )
