"""Accuracy, confusion, cosine, overlap and error, against values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vitray.evaluation.metrics import (
    accuracy,
    commonest_mistakes,
    confusion,
    largest_relative_error,
    mean_overlap,
)
from vitray.vectors import cosines


@pytest.mark.parametrize(
    ("labels", "truth", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 1.0),
        ([0, 1, 2, 3], [0, 1, 3, 2], 0.5),
        (["cat", "dog", None], ["cat", "cat", None], 2 / 3),
        ([1], [0], 0.0),
        ([], [], 0.0),
    ],
)
def test_accuracy_is_the_share_of_equal_labels(
    labels: list[object], truth: list[object], expected: float
) -> None:
    assert accuracy(labels, truth) == expected
    assert accuracy(np.array(labels), np.array(truth)) == expected


def test_accuracy_of_labels_and_truths_of_different_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 labels and 1 true label"):
        accuracy([0, 1], [0])


def test_confusion_has_a_row_for_each_true_class_and_a_column_for_each_prediction() -> None:
    truth, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 2, 2])
    assert confusion(truth, predicted, 4).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 0, 0],
        [1, 0, 2, 0],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    ("truth", "predicted", "most", "expected"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 5, []),
        ([0, 0, 1, 1, 2], [1, 1, 0, 1, 0], 5, [(0, 1, 2), (1, 0, 1), (2, 0, 1)]),
        ([0, 0, 1, 1, 2], [1, 1, 0, 1, 0], 1, [(0, 1, 2)]),
    ],
)
def test_commonest_mistakes_are_pairs_of_wrong_predictions_by_count(
    truth: list[int], predicted: list[int], most: int, expected: list[tuple[int, int, int]]
) -> None:
    assert commonest_mistakes(np.array(truth), np.array(predicted), most) == expected


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([1, 0], [2, 0], 1.0),
        ([1, 0], [0, 3], 0.0),
        ([1, 0], [-1, 0], -1.0),
        ([3, 4], [4, 3], 24 / 25),
        ([0, 0], [1, 0], 0.0),
        ([0, 0], [0, 0], 0.0),
    ],
)
def test_cosines_are_those_of_rows_and_0_for_a_zero_vector(
    one: list[float], two: list[float], expected: float
) -> None:
    rows = cosines(np.array([one, [1, 1]], np.float16), np.array([two, [1, 1]], np.float32))
    assert rows == pytest.approx([expected, 1.0])


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ([[1, 2]], [[2, 1]], 1.0),
        ([[1, 2]], [[3, 4]], 0.0),
        ([[1, 2], [1, 2]], [[1, 3], [1, 2]], 0.75),
    ],
)
def test_mean_overlap_is_the_shared_part_of_two_lists_of_ids(
    one: list[list[int]], two: list[list[int]], expected: float
) -> None:
    assert mean_overlap(one, two, 2) == expected


def test_the_largest_relative_error_is_that_of_the_worst_row() -> None:
    expected = np.array([[3.0, 4.0], [10.0, 0.0], [0.0, 1.0]])
    computed = np.array([[3.0, 4.5], [10.0, 2.0], [0.0, 1.0]])
    assert largest_relative_error(expected, expected) == 0
    assert largest_relative_error(expected, computed) == pytest.approx(0.2)
