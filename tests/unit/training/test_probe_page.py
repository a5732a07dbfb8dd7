"""The page of a linear probe: its regularisation sweep, right and wrong images."""

from __future__ import annotations

import numpy as np
import pytest

from support.reports import Tables
from vitray.models.checkpoint import Checkpoint
from vitray.training.config import TrainingConfig
from vitray.training.outcome import (
    MOST_RIGHT,
    MOST_WRONG,
    Evaluation,
    HeldOut,
    TrainingOutcome,
    shown_images,
)
from vitray.training.page import page_of, strength_name, sweep

RECORDS = [
    {"strength": 10.0, "loss": 2.0, "validation_loss": 1.5, "validation_accuracy": 0.25},
    {"strength": 0.001, "loss": 1.0, "validation_loss": 0.5, "validation_accuracy": 0.75},
]


@pytest.mark.parametrize(
    ("strength", "expected"), [(10.0, "10"), (0.1, "0.1"), (0.001, "1e-3"), (1e-5, "1e-5")]
)
def test_strengths_are_named_briefly(strength: float, expected: str) -> None:
    assert strength_name(strength) == expected


def test_a_sweep_begins_with_the_weakest_and_marks_the_chosen_one() -> None:
    shown = sweep(RECORDS, RECORDS[1])
    assert shown is not None and shown["path"].count("L") == 1
    assert [(each["name"], each["is_chosen"]) for each in shown["strengths"]] == [
        ("1e-3", True),
        ("10", False),
    ]
    assert sweep(RECORDS, None) is None
    alone = sweep([{"strength": 0.01, "loss": 1.0}], {"strength": 0.01, "loss": 1.0})
    assert alone is not None and alone["path"] is None


def test_the_worst_mistakes_and_evenly_spread_right_images_are_shown() -> None:
    truth = np.zeros(100, np.int64)
    ids = (np.arange(100) >= 60).astype(np.int64)  # the last 40 are wrong
    evaluation = Evaluation(ids, np.ones(100, np.float32), np.arange(100, dtype=np.float32))
    shown = shown_images(truth, evaluation)
    assert shown.wrong == list(range(99, 99 - MOST_WRONG, -1))
    assert len(shown.right) == MOST_RIGHT and (shown.right[0], shown.right[-1]) == (0, 59)


def test_the_page_of_a_probe_shows_its_sweep_and_pictures_and_no_curve() -> None:
    evaluation = Evaluation(
        np.array([0, 1, 1]), np.array([0.9, 0.8, 0.7], np.float32), np.ones(3, np.float32)
    )
    held_out = HeldOut(
        ["a.jpg", "b.jpg", "c.jpg"],
        np.array([0, 1, 0]),
        evaluation,
        {0: "data:image/jpeg;base64,AAAA", 2: "data:image/jpeg;base64,BBBB"},
    )
    outcome = TrainingOutcome(
        config=TrainingConfig(dataset="d", train="probe", label="cls", out="o"),
        base=Checkpoint("m", None, "."),
        classes=("cat", "dog"),
        records=RECORDS,
        skipped=[],
        figures={},
        held_out=held_out,
        chosen=RECORDS[1],
        notes=["Some images are gone."],
    )
    page = page_of(outcome)
    assert Tables(page).tables["Figures by regularisation strength"] == [
        ["1e-3, chosen", "75.00%", "0.5", "1"],
        ["10", "25.00%", "1.5", "2"],
    ]
    assert 'id="curves"' not in page and "at the end" not in page
    assert page.count("data:image/jpeg") == 2 and page.count("no picture of b.jpg") == 1
    assert "Worst images" in page and "Right images" in page and "Some images are gone." in page
