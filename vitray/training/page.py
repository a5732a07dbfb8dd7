"""The page of a training: its curves, its mistakes, its worst images. One HTML file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from vitray.evaluation.metrics import accuracy, commonest_mistakes, confusion
from vitray.html import axis, rendered
from vitray.training.outcome import HeldOut, TrainingOutcome, shown_images

MOST_CLASSES = 20  # of a table of all classes against all
MOST_PAIRS = 20
MOST_SKIPPED = 100
LEFT, BOTTOM, WIDTH, HEIGHT = 48, 220, 424, 208  # of the frame in macros.html, in SVG units


def page_of(outcome: TrainingOutcome) -> str:
    """The page as HTML. Names come from data, so everything is escaped.

    Characters that could turn or hide text are replaced.
    """
    held_out = outcome.held_out
    config = outcome.config.model_dump(mode="json")
    values: dict[str, Any] = {
        "confusion": None,
        "pairs": [],
        "worst": [],
        "right": [],
        "accuracy": None,
        "images": 0,
    }
    if held_out is not None:
        shown = shown_images(held_out.truth, held_out.evaluation)
        values = {
            "confusion": _confusion(outcome.classes, held_out),
            "pairs": _mistakes(outcome.classes, held_out),
            "worst": _cards(outcome.classes, held_out, shown.wrong),
            "right": _cards(outcome.classes, held_out, shown.right),
            "accuracy": accuracy(held_out.evaluation.ids, held_out.truth),
            "images": len(held_out.truth),
        }
    return rendered(
        "training",
        "page.html",
        maker="vitray finetune",
        name=outcome.config.out.rstrip("/").rpartition("/")[2],
        notes=outcome.notes,
        made_from="the training's own records",
        holds_pictures=held_out is not None and bool(held_out.pictures),
        config={name: json.dumps(value) for name, value in config.items()},
        curves=curves(outcome.records) if outcome.chosen is None else [],
        sweep=sweep(outcome.records, outcome.chosen),
        skipped=outcome.skipped[:MOST_SKIPPED],
        skipped_total=len(outcome.skipped),
        **values,
    )


def curves(records: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A curve for each figure with two points: its name, range, axis, and SVG path."""
    names = ("loss", "validation_loss", "validation_accuracy", "lr")
    drawn = [_curve(name, _points(name, records)) for name in names]
    return [curve for curve in drawn if curve is not None]


def sweep(
    records: list[dict[str, float]], chosen: dict[str, float] | None
) -> dict[str, Any] | None:
    """The strengths of a linear probe's regularisation, the weakest first.

    Each has its figures, whether it is the chosen one, and where its point stands in the chart.
    None for any other training. path: None without held-out images, which leave one strength.
    """
    if chosen is None:
        return None
    ordered = sorted(records, key=lambda record: record["strength"])
    strengths = [
        {
            **record,
            "name": strength_name(record["strength"]),
            "is_chosen": record == chosen,
            "x": LEFT + WIDTH * (n + 0.5) / len(ordered),
            "y": BOTTOM - HEIGHT * record.get("validation_accuracy", 0.0),
        }
        for n, record in enumerate(ordered)
    ]
    points = "L".join(f"{each['x']:.1f} {each['y']:.1f}" for each in strengths)
    is_measured = all("validation_accuracy" in record for record in ordered)
    return {"strengths": strengths, "path": f"M{points}" if is_measured else None}


def strength_name(strength: float) -> str:
    """A strength in few characters: 10, 0.01, 1e-3."""
    if strength >= 0.01:
        return f"{strength:g}"
    mantissa, exponent = f"{strength:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _points(name: str, records: list[dict[str, float]]) -> list[tuple[float, float]]:
    """(step, value) of a figure; the loss is that of steps, not of epochs."""
    return [
        (record.get("step", n), record[name])
        for n, record in enumerate(records)
        if name in record and (name != "loss" or "epoch" not in record)
    ]


def _curve(name: str, points: list[tuple[float, float]]) -> dict[str, Any] | None:
    if len(points) < 2:
        return None
    steps, values = np.array(points, float).T
    ticks = axis(1.0 if name == "validation_accuracy" else values.max())
    xs = LEFT + WIDTH * (steps - steps[0]) / max(1, steps[-1] - steps[0])
    ys = BOTTOM - HEIGHT * values / ticks[-1]
    return {
        "name": name.replace("_", " "),
        "axis": ticks,
        "path": "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys)),
        "last": values[-1],
        "low": values.min(),
        "high": values.max(),
        "steps": int(steps[-1]),
    }


def _confusion(classes: tuple[str, ...], held_out: HeldOut) -> list[tuple[str, list[int]]] | None:
    """(class, images by predicted class) of each class; None for too many classes."""
    if len(classes) > MOST_CLASSES:
        return None
    counts = confusion(held_out.truth, held_out.evaluation.ids, len(classes))
    return list(zip(classes, counts.tolist()))


def _mistakes(classes: tuple[str, ...], held_out: HeldOut) -> list[tuple[str, str, int]]:
    """(true class, predicted class, images), the commonest first."""
    pairs = commonest_mistakes(held_out.truth, held_out.evaluation.ids, MOST_PAIRS)
    return [(classes[true], classes[predicted], images) for true, predicted, images in pairs]


def _cards(classes: tuple[str, ...], held_out: HeldOut, numbers: list[int]) -> list[dict[str, Any]]:
    """What the page shows of these held-out images."""
    evaluation, truth = held_out.evaluation, held_out.truth
    return [
        {
            "key": held_out.keys[n],
            "true": classes[truth[n]],
            "predicted": classes[evaluation.ids[n]],
            "score": float(evaluation.scores[n]),
            "picture": held_out.pictures.get(n),
        }
        for n in numbers
    ]
