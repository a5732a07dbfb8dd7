"""What a training writes: the checkpoint, metrics, the model card and the page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import vitray
from vitray.training.examples import is_held_out


def test_the_output_is_a_checkpoint_that_model_takes(
    trained: str, small: dict[str, object], tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    result = json.loads(Path(trained, "_vitray", "result.json").read_text())
    job = vitray.Job(
        source=small["source"],
        model=trained,
        out=str(tmp_path / "out"),
        keep=["cls"],
        precision="fp32",
        engine="torch",
    )
    vitray.run(job)
    rows = vitray.read(job.out).to_pylist()
    held = [row for row in rows if is_held_out(row["key"], 0.2)]
    assert len(held) == result["held_out"] and len(rows) == result["images"] + result["held_out"]
    accuracy = np.mean([row["label"] == row["cls"] for row in held])
    assert accuracy == pytest.approx(result["figures"]["validation_accuracy"]) and accuracy > 0.3
    # transformers alone says the same, and finds no weight missing
    model, info = AutoModelForImageClassification.from_pretrained(trained, output_loading_info=True)
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and model.config.id2label[3] == "3"
    )
    assert AutoImageProcessor.from_pretrained(trained, backend="pil").size == {
        "height": 16,
        "width": 16,
    }


def test_metrics_events_card_and_page_agree(trained: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = [json.loads(line) for line in Path(trained, "metrics.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "epoch" in record]
    assert [record["epoch"] for record in epochs] == list(range(1, 26)) and epochs[-1][
        "loss"
    ] < records[0]["loss"]
    events = EventAccumulator(f"{trained}/tensorboard")
    events.Reload()
    reported = [(event.step, event.value) for event in events.Scalars("validation_accuracy")]
    assert [step for step, _ in reported] == [record["step"] for record in epochs]
    assert [value for _, value in reported] == pytest.approx(
        [record["validation_accuracy"] for record in epochs]
    )
    result = json.loads(Path(trained, "_vitray", "result.json").read_text())
    card, page = Path(trained, "README.md").read_text(), Path(trained, "report.html").read_text()
    assert (
        f"| accuracy | {result['figures']['validation_accuracy']:.4f} |" in card
        and trained not in card
    )
    assert (
        f"{100 * result['figures']['validation_accuracy']:.2f}%" in page
        and "data:image/jpeg;base64," in page
    )
    assert (
        not os.path.exists(f"{trained}/_vitray/images") and result["out"] == ""
    )  # not a path of this machine
