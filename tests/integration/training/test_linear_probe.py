"""A linear probe on stored embeddings: a checkpoint and a head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from factories import digits
from vitray.training.linear_probe import LabelledRows, fit_linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_linear_probe_is_the_minimum_of_its_loss() -> None:
    from sklearn.linear_model import LogisticRegression

    images, labels = digits.load()
    rows = images[:900].reshape(900, -1).astype(np.float32)
    train = LabelledRows(rows, labels[:900].astype(np.int64))
    none = LabelledRows(np.zeros((0, 64), np.float32), np.zeros(0, np.int64))
    found = fit_linear_probe(train, none, torch.ones(10), 0.0)
    scaled = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
    known = LogisticRegression(C=1 / (900 * 1e-2), max_iter=2000, tol=1e-8).fit(
        scaled, labels[:900]
    )
    ours, theirs = rows @ found.weight.T + found.bias, known.decision_function(scaled)
    np.testing.assert_allclose(
        ours - ours.mean(1, keepdims=True), theirs - theirs.mean(1, keepdims=True), atol=2e-2
    )


def test_a_linear_probe_chooses_its_strength_by_the_metric() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 3, 120)
    vectors = (np.eye(3)[ids] @ rng.normal(size=(3, 40)) + 3 * rng.normal(size=(120, 40))).astype(
        np.float32
    )
    sides = LabelledRows(vectors[:80], ids[:80]), LabelledRows(vectors[80:], ids[80:])
    by_loss, by_accuracy = (
        fit_linear_probe(*sides, torch.ones(3), 0.0, metric) for metric in ("loss", "accuracy")
    )
    assert by_loss.best["validation_loss"] == min(
        record["validation_loss"] for record in by_loss.records
    )
    assert by_accuracy.best["validation_accuracy"] == max(
        record["validation_accuracy"] for record in by_accuracy.records
    )
    assert by_loss.best != by_accuracy.best  # else the test shows nothing
