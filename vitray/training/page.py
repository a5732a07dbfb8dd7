"""The page of a training: curves, what is taken for what, the worst images. One HTML file that
needs nothing else.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from vitray.html import axis, rendered
from vitray.training.config import TrainingConfig

if TYPE_CHECKING:
    from vitray.training.outputs import Seen

CELLS = 20  # classes that a table of all against all still shows
PAIRS, WORST, SKIPPED = 20, 24, 100
LEFT, BOTTOM, WIDTH, HEIGHT = 48, 220, 424, 208  # of the frame that macros.html draws


def page_of(
    config: TrainingConfig,
    classes: tuple[str, ...],
    records: list[dict[str, float]],
    skipped: list[dict[str, str]],
    seen: Seen | None,
) -> str:
    """The page as text. Names come from data: everything is escaped, and what could turn or hide
    text is replaced.
    """
    worst = _worst(classes, seen) if seen is not None else []
    return rendered(
        "training",
        "page.html",
        maker="vitray finetune",
        name=config.out.rstrip("/").rpartition("/")[2],
        notes=(),
        made_from="the training's own records",
        holds_pictures=any(it["picture"] for it in worst),
        config={name: json.dumps(value) for name, value in config.model_dump(mode="json").items()},
        curves=curves(records),
        confusion=_confusion(classes, seen) if seen is not None and len(classes) <= CELLS else None,
        pairs=_pairs(classes, seen) if seen is not None else [],
        worst=worst,
        skipped=skipped[:SKIPPED],
        lost=len(skipped),
        accuracy=float((seen.judged.ids == seen.truth).mean()) if seen is not None else None,
        images=len(seen.truth) if seen is not None else 0,
    )


def curves(records: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A drawing for each figure: its name, last value, range, axis, and an SVG path in the frame of
    macros.html.
    """
    drawn = []
    for name in ("loss", "validation_loss", "validation_accuracy", "lr"):
        told = [
            (n, it)
            for n, it in enumerate(records)
            if name in it and ("epoch" not in it or name != "loss")
        ]
        points = [(it.get("step", n), it[name]) for n, it in told]
        if len(points) < 2:
            continue
        xs, ys = np.array(points, float).T
        ticks = axis(1.0 if name == "validation_accuracy" else ys.max())
        right = LEFT + WIDTH * (xs - xs[0]) / max(1, xs[-1] - xs[0])
        down = BOTTOM - HEIGHT * ys / ticks[-1]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(right, down))
        spec = {"last": ys[-1], "low": ys.min(), "high": ys.max(), "steps": int(xs[-1])}
        drawn.append({"name": name.replace("_", " "), "axis": ticks, "path": path, **spec})
    return drawn


def _confusion(classes: tuple[str, ...], seen: Seen) -> list[tuple[str, list[int]]]:
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (seen.truth, seen.judged.ids), 1)
    return [(name, [int(n) for n in row]) for name, row in zip(classes, counts)]


def _pairs(classes: tuple[str, ...], seen: Seen) -> list[tuple[str, str, int]]:
    wrong = seen.truth != seen.judged.ids
    pairs = Counter(zip(seen.truth[wrong].tolist(), seen.judged.ids[wrong].tolist()))
    return [(classes[true], classes[said], n) for (true, said), n in pairs.most_common(PAIRS)]


def _worst(classes: tuple[str, ...], seen: Seen) -> list[dict[str, Any]]:
    """The wrong images of the largest loss."""
    order = [
        n
        for n in np.argsort(-seen.judged.losses, kind="stable")
        if seen.judged.ids[n] != seen.truth[n]
    ][:WORST]
    return [
        {
            "key": seen.keys[n],
            "true": classes[seen.truth[n]],
            "said": classes[seen.judged.ids[n]],
            "score": float(seen.judged.scores[n]),
            "picture": _picture(seen.pixels[n]) if seen.pixels is not None else None,
        }
        for n in order
    ]


def _picture(pixels: np.ndarray) -> str:
    """What the model saw, as a JPEG of ours: not a byte of the input reaches the page."""
    import simplejpeg

    return (
        "data:image/jpeg;base64,"
        + b64encode(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 90, "RGB", "444")).decode()
    )
