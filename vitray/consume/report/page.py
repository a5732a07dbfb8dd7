"""What the page says: counts as figures, tables and charts, and the template that takes them.
Private to this package.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitray.consume.report.counts import MEMBERS, SCORE_BINS, Counts, Ref, count, is_right, text_of
from vitray.consume.report.pictures import pictures_of, rows_of
from vitray.consume.report.space import NEAR, near_groups, on_a_plane
from vitray.dataset import Dataset, dataset_url, read_run_records
from vitray.errors import VitrayError, one_line
from vitray.html import axis, rendered
from vitray.pipeline import list_source
from vitray.schema import REASONS, Shard
from vitray.sources import select_shards
from vitray.storage import exists, join, read

RUNS = 40  # the latest
STEPS, STEP_MARKS = (
    48,
    3,
    # of one run over time, at most; metadata of its timeline for each step, or bursts would look
    # like speed
)
LABELS = 30  # of the histogram
GALLERY = 12  # labels with pictures; with EACH_LABEL, LEAST_SURE and TWINS at most 120 pictures
SERIES = 8  # colours of the map
TWINS, ALIKE = 4, 6  # groups of equal and of similar images, each with MEMBERS pictures


@dataclass(frozen=True, slots=True)
class Page:
    html: str
    images: int
    pictures: int
    notes: tuple[str, ...]


def page_of(dataset: Dataset, urls: Sequence[str], truth: str | None, pictures: bool) -> Page:
    """The page of a dataset with these data files."""
    counts = count(dataset, urls, truth)
    shards, notes = listed(dataset)
    twin_rows, twins = counts.same_bytes.groups(TWINS)
    groups = {
        "twins": [(n, [(counts.shards[s], i) for s, i in first]) for n, first in twins],
        "alike": _alike(counts),
    }
    shown = _shown(counts, groups)
    names = [
        "key",
        "content_hash",
        *(["label", "label_id", "score"] if dataset.job.labelled else []),
        *([truth] if truth else []),
    ]
    rows = rows_of(dataset, shown, list(dict.fromkeys(names)))
    images, why = pictures_of(dataset, shards, rows) if pictures and shards else ({}, [])
    notes += why

    def cards(refs: Iterable[Ref]) -> list[dict[str, Any]]:
        return [
            _card(dataset, rows[ref], images.get(ref, None if pictures else ""), truth)
            for ref in refs
        ]

    html = rendered(
        "consume/report",
        "page.html",
        maker="vitray report",
        name=dataset.out.rpartition("/")[2],
        state=_state(dataset, counts, shards),
        notes=notes,
        counts=counts,
        truth=truth,
        runs=_runs(dataset),
        labels=counts.labels.most_common(LABELS),
        scores=[
            (n / SCORE_BINS, (n + 1) / SCORE_BINS, int(value))
            for n, value in enumerate(counts.scores)
        ],
        score_axis=axis(int(counts.scores.max())),
        calibration=_calibration(counts),
        gallery=[
            (label, n, cards(counts.by_label.get(label, [])))
            for label, n in counts.labels.most_common(GALLERY * pictures)
        ],
        least_sure=cards(ref for _, ref in counts.least_sure),
        failures=[
            (reason, REASONS.get(reason, ""), n, counts.examples[reason])
            for reason, n in counts.reasons.most_common()
        ],
        map=_map(counts) if sum(map(len, counts.vectors)) > 2 else None,
        groups={
            name: [(size, cards(refs)) for size, refs in found] for name, found in groups.items()
        },
        twin_rows=twin_rows,
        near=NEAR,
        dataset=dataset,
        document=json.loads(read(dataset_url(dataset.out))),
        made_from="the dataset's own files",
        holds_pictures=bool(images),
    )
    return Page(html, counts.images, len(images), tuple(notes))


def wilson(right: float, of: float) -> tuple[float, float]:
    """The 95% interval of a share. Source: Wilson 1927."""
    z = 1.96
    share, width = right / of, z * math.sqrt(right * (of - right) / of + z * z / 4) / (of + z * z)
    middle = (share * of + z * z / 2) / (of + z * z)
    return max(0.0, middle - width), min(1.0, middle + width)


def within(record: dict[str, Any]) -> dict[str, Any] | None:
    """Images/s of one run in equal steps of its time, and in the mean; None where too little was
    recorded.
    """
    metadata = np.array([(0, 0), *record.get("timeline", ())], float)
    steps, (end, images) = min(STEPS, (len(metadata) - 1) // STEP_MARKS), metadata[-1]
    if steps < 2 or not end:
        return None
    edges = np.linspace(0, end, steps + 1)
    rates = np.diff(np.interp(edges, *metadata.T)) * steps / end
    unit, unit_s = (
        ("seconds", 1) if end < 120 else ("minutes", 60) if end < 3 * 3600 else ("hours", 3600)
    )
    top, wide = axis(rates.max()), 424 / steps
    path = "".join(
        f"V{220 - 208 * rate / top[-1]:.1f}H{48 + wide * (n + 1):.1f}"
        for n, rate in enumerate(rates)
    )
    return {
        "finished": record["finished"],
        "rates": [(n * end / steps / unit_s, float(rate)) for n, rate in enumerate(rates)],
        "mean": images / end,
        "step_s": end / steps,
        "unit": unit,
        "times": [
            (tick, 48 + 424 * tick * unit_s / end)
            for tick in axis(end / unit_s)
            if tick * unit_s <= end
        ],
        "axis": top,
        "path": f"M48 220{path}V220Z",
    }


def listed(dataset: Dataset) -> tuple[dict[str, Shard], list[str]]:
    """The shards of the source as it is now, and why it cannot be listed."""
    try:
        return {shard.id: shard for shard in list_source(dataset.job, dataset.out).shards}, []
    except (VitrayError, OSError) as error:
        return {}, [f"The source cannot be listed, so there are no pictures: {one_line(error)}"]


def _state(dataset: Dataset, counts: Counts, listed: dict[str, Shard]) -> str:
    planned = select_shards(list(listed.values()), dataset.job)
    pending = len({shard.id for shard in planned} - set(counts.shards))
    if not counts.shards:
        return "empty: nothing is committed yet"
    if exists(join(dataset.out, "_SUCCESS.json")) and not pending:
        return "complete"
    return (
        f"not complete: {pending:,} of {len(planned):,} shards are still to do"
        if pending
        else "not complete"
    )


def _card(
    dataset: Dataset, row: dict[str, Any], picture: str | None, truth: str | None
) -> dict[str, Any]:
    true = text_of(row[truth]) if truth else ""
    is_wrong = true != "" and not is_right(dataset, true, row["label"], row["label_id"])
    return {**row, "picture": picture, "true": true if is_wrong else ""}


def _shown(counts: Counts, groups: dict[str, list[tuple[int, list[Ref]]]]) -> list[Ref]:
    """Every row of which the page shows a picture."""
    refs = [
        ref
        for label, _ in counts.labels.most_common(GALLERY)
        for ref in counts.by_label.get(label, [])
    ]
    refs += [ref for _, ref in counts.least_sure]
    return list(
        dict.fromkeys(
            refs + [ref for found in groups.values() for _, members in found for ref in members]
        )
    )


def _alike(counts: Counts) -> list[tuple[int, list[Ref]]]:
    """Groups of near vectors in the sample, in which equal images count once."""
    if not counts.vectors:
        return []
    _, own = np.unique(counts.sampled_hashes, return_index=True)
    own.sort()
    groups = near_groups(np.concatenate(counts.vectors)[own])[:ALIKE]
    return [(len(group), [counts.sampled[own[n]] for n in group[:MEMBERS]]) for group in groups]


def _runs(dataset: Dataset) -> dict[str, Any]:
    """The latest runs that computed something: images/s of each, and the time of each step over all
    of them.
    """
    records: list[dict[str, Any]] = [dict(record) for record in read_run_records(dataset.out)]
    worked = [record for record in records if record.get("images")]
    steps: Counter[str] = Counter()
    for record in worked:
        steps.update(record.get("seconds_by_step", {}))
    images, total = sum(record["images"] for record in worked), sum(steps.values())
    return {
        "records": worked[-RUNS:],
        "earlier": max(0, len(worked) - RUNS),
        "axis": axis(max((record["images_per_s"] for record in worked[-RUNS:]), default=1)),
        "steps": [(step, s, s / total, images / s if s else 0) for step, s in steps.items()]
        if total
        else [],
        "images": images,
        "within": within(worked[-1]) if worked else None,
    }


def _calibration(counts: Counts) -> dict[str, Any] | None:
    """Bins of (rows, mean score, share right, its interval); the mean gap between score and share;
    None without a truth.
    """
    bins = [
        (int(n), score / n, right / n, *wilson(right, n)) for n, right, score in counts.truth if n
    ]
    known, right, _ = counts.truth.sum(0)
    gap = sum(n * abs(score - share) for n, score, share, *_ in bins) / max(1, known)
    return (
        {"bins": bins, "known": known, "gap": gap, "most": max(bins)[0], "accuracy": right / known}
        if bins
        else None
    )


def _map(counts: Counts) -> dict[str, Any]:
    """Points of the sample by label, as SVG paths on a square of 460 units, the commonest labels
    first.
    """
    points, how = on_a_plane(np.concatenate(counts.vectors))
    labels = np.array(counts.sampled_labels)
    named = [label for label, _ in Counter(counts.sampled_labels).most_common(SERIES)]
    kinds = [(label, points[labels == label]) for label in named]
    if (others := points[~np.isin(labels, named)]).size:
        kinds.append((f"{len(set(counts.sampled_labels)) - len(named)} other labels", others))
    paths = [
        (label, len(some), "".join(f"M{10 + 460 * x:.1f} {470 - 460 * y:.1f}h0" for x, y in some))
        for label, some in kinds
    ]
    return {"series": paths, "how": how, "rows": len(points)}
