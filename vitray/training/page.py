"""The page of a training: its curves, its mistakes, its worst images. One HTML file."""

from __future__ import annotations

import json
from base64 import b64encode
from typing import Any

import numpy as np

from vitray.evaluation.metrics import accuracy, commonest_mistakes, confusion
from vitray.html import axis, rendered
from vitray.training.outcome import HeldOut, TrainingOutcome

MOST_CLASSES = 20  # of a table of all classes against all
MOST_PAIRS = 20
MOST_WORST = 24
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
        "accuracy": None,
        "images": 0,
    }
    if held_out is not None:
        values = {
            "confusion": _confusion(outcome.classes, held_out),
            "pairs": _mistakes(outcome.classes, held_out),
            "worst": _worst(outcome.classes, held_out),
            "accuracy": accuracy(held_out.evaluation.ids, held_out.truth),
            "images": len(held_out.truth),
        }
    return rendered(
        "training",
        "page.html",
        maker="vitray finetune",
        name=outcome.config.out.rstrip("/").rpartition("/")[2],
        notes=(),
        made_from="the training's own records",
        holds_pictures=any(image["picture"] for image in values["worst"]),
        config={name: json.dumps(value) for name, value in config.items()},
        curves=curves(outcome.records),
        skipped=outcome.skipped[:MOST_SKIPPED],
        skipped_total=len(outcome.skipped),
        **values,
    )


def curves(records: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A curve for each figure with two points: its name, range, axis, and SVG path."""
    names = ("loss", "validation_loss", "validation_accuracy", "lr")
    drawn = [_curve(name, _points(name, records)) for name in names]
    return [curve for curve in drawn if curve is not None]


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


def _worst(classes: tuple[str, ...], held_out: HeldOut) -> list[dict[str, Any]]:
    """The wrongly labelled images with the largest losses."""
    evaluation, truth = held_out.evaluation, held_out.truth
    by_loss = np.argsort(-evaluation.losses, kind="stable")
    wrong = by_loss[evaluation.ids[by_loss] != truth[by_loss]]
    return [
        {
            "key": held_out.keys[n],
            "true": classes[truth[n]],
            "predicted": classes[evaluation.ids[n]],
            "score": float(evaluation.scores[n]),
            "picture": _picture(held_out.pixels[n]) if held_out.pixels is not None else None,
        }
        for n in wrong[:MOST_WORST]
    ]


def _picture(pixels: np.ndarray) -> str:
    """The model's input as a JPEG in a data URL. No byte of the original file reaches the page."""
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")
    return "data:image/jpeg;base64," + b64encode(jpeg).decode()
