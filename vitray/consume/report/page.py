"""The content of the page of a dataset: figures, tables and charts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitray.consume.report.counts import MEMBERS, SCORE_BINS, Counts, is_right
from vitray.consume.report.counts import count as counts_of
from vitray.consume.report.space import NEAR, near_groups, on_a_plane
from vitray.consume.report.truth import TrueLabels
from vitray.dataset import Dataset, dataset_url, is_complete, read_run_records
from vitray.errors import VitrayError, one_line
from vitray.errors import count as count_text
from vitray.evaluation.pictures import Ref, pictures_of, rows_of
from vitray.html import axis, rendered
from vitray.pipeline import list_source
from vitray.schema import Shard, describe_reason
from vitray.sources import select_shards
from vitray.storage import read

RUNS = 40  # the latest ones
STEPS = 48  # of the chart of one run over time, at most
STEP_POINTS = 3  # points of a run's timeline per step; with fewer, bursts would look like speed
LABELS = 30  # of the histogram
GALLERY = 12  # labels with pictures; with EACH_LABEL, LEAST_SURE and TWINS at most 120 pictures
SERIES = 8  # colours of the map
TWINS = 4  # groups of equal images, each with MEMBERS pictures
ALIKE = 6  # groups of similar images, likewise
# x and y of a chart's plot area: 424 x 208 units
CHART_LEFT, CHART_WIDTH = 48, 424
CHART_BOTTOM, CHART_HEIGHT = 220, 208


@dataclass(frozen=True, slots=True)
class Page:
    """An HTML page. images: of the dataset. pictures: on the page. notes: what the page lacks."""

    html: str
    images: int
    pictures: int
    notes: tuple[str, ...]


def page_of(
    dataset: Dataset, urls: Sequence[str], truth: TrueLabels | None, pictures: bool
) -> Page:
    """The page of a dataset with these data files."""
    counts = counts_of(dataset, urls, truth)
    shards, notes = listed_shards(dataset)
    notes += _truth_notes(truth, counts)
    twin_rows, twins = counts.same_bytes.groups(TWINS)
    groups = {
        "twins": [(n, [(counts.shards[s], i) for s, i in first]) for n, first in twins],
        "alike": _alike(counts),
    }
    cards = _Cards(dataset, truth)
    picture_count = 0
    cards.read(_shown(counts, groups))
    if pictures:
        notes += cards.add_pictures(shards)
        picture_count = len(cards.pictures or {})
    html = rendered(
        "consume/report",
        "page.html",
        maker="vitray report",
        name=dataset.out.rpartition("/")[2],
        state=_state(dataset, counts, shards),
        notes=notes,
        counts=counts,
        truth=truth.name if truth else None,
        runs=_runs(dataset),
        labels=counts.labels.most_common(LABELS),
        scores=_score_bins(counts),
        score_axis=axis(int(counts.scores.max())),
        calibration=_calibration(counts),
        gallery=_gallery(counts, cards) if pictures else [],
        least_sure=cards.of(ref for _, ref in counts.least_sure),
        failures=_failures(counts),
        map=_map(counts) if sum(map(len, counts.vectors)) > 2 else None,
        groups={
            name: [(size, cards.of(refs)) for size, refs in sized_groups]
            for name, sized_groups in groups.items()
        },
        twin_rows=twin_rows,
        near=NEAR,
        dataset=dataset,
        document=json.loads(read(dataset_url(dataset.out))),
        made_from="the dataset's own files",
        holds_pictures=picture_count > 0,
    )
    return Page(html, counts.images, picture_count, tuple(notes))


class _Cards:
    """What the page shows of single rows."""

    def __init__(self, dataset: Dataset, truth: TrueLabels | None) -> None:
        self._dataset = dataset
        self._truth = truth
        self._rows: dict[Ref, dict[str, Any]] = {}
        self.pictures: dict[Ref, str] | None = None  # None: the page has none

    def read(self, refs: Iterable[Ref]) -> None:
        """Read these rows."""
        names = ["key", "content_hash"]
        if self._dataset.job.labelled:
            names += ["label", "label_id", "score"]
        if self._truth and self._truth.column not in names:
            names.append(self._truth.column)
        self._rows = rows_of(self._dataset, refs, names)

    def add_pictures(self, shards: dict[str, Shard]) -> list[str]:
        """Make pictures of the rows from the source; returns why some are missing."""
        self.pictures = {}
        if not shards:
            return []
        self.pictures, notes = pictures_of(self._dataset, shards, self._rows)
        return notes

    def of(self, refs: Iterable[Ref]) -> list[dict[str, Any]]:
        return [self._card(ref) for ref in refs]

    def _card(self, ref: Ref) -> dict[str, Any]:
        row = self._rows[ref]
        true = self._truth.label_of(row[self._truth.column]) if self._truth else ""
        is_wrong = true != "" and not is_right(self._dataset, true, row["label"], row["label_id"])
        picture = "" if self.pictures is None else self.pictures.get(ref)
        return {**row, "picture": picture, "true": true if is_wrong else ""}


def _truth_notes(truth: TrueLabels | None, counts: Counts) -> list[str]:
    if truth is None:
        return []
    notes = truth.notes()
    if counts.unknown_truth:
        notes.append(
            f"{counts.unknown_truth:,} of {counts.rows:,} labelled images have no true label in "
            f"{truth.name}."
        )
    return notes


def _score_bins(counts: Counts) -> list[tuple[float, float, int]]:
    """(low, high, rows) of each bin of scores."""
    return [
        (n / SCORE_BINS, (n + 1) / SCORE_BINS, int(value)) for n, value in enumerate(counts.scores)
    ]


def _gallery(counts: Counts, cards: _Cards) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """(label, rows, cards) of the most frequent labels."""
    return [
        (label, n, cards.of(counts.by_label.get(label, [])))
        for label, n in counts.labels.most_common(GALLERY)
    ]


def _failures(counts: Counts) -> list[tuple[str, str, int, list[dict[str, str]]]]:
    """(reason, meaning, images, examples) of error rows, the most frequent reason first."""
    return [
        (reason, describe_reason(reason), n, counts.examples[reason])
        for reason, n in counts.reasons.most_common()
    ]


def wilson(right: float, total: float) -> tuple[float, float]:
    """The 95% interval of the share right / total. Source: Wilson 1927."""
    z = 1.96
    share = right / total
    margin = z * math.sqrt(right * (total - right) / total + z * z / 4) / (total + z * z)
    middle = (share * total + z * z / 2) / (total + z * z)
    return max(0.0, middle - margin), min(1.0, middle + margin)


def within(record: dict[str, Any]) -> dict[str, Any] | None:
    """Images/s of one run in equal steps of time, and their mean; None for too short a record."""
    timeline = np.array([(0, 0), *record.get("timeline", ())], float)
    steps = min(STEPS, (len(timeline) - 1) // STEP_POINTS)
    end, images = timeline[-1]
    if steps < 2 or not end:
        return None
    edges = np.linspace(0, end, steps + 1)
    rates = np.diff(np.interp(edges, *timeline.T)) * steps / end
    unit, unit_s = _time_unit(end)
    rate_axis = axis(rates.max())
    step_width = CHART_WIDTH / steps
    path = "".join(
        f"V{CHART_BOTTOM - CHART_HEIGHT * rate / rate_axis[-1]:.1f}"
        f"H{CHART_LEFT + step_width * (n + 1):.1f}"
        for n, rate in enumerate(rates)
    )
    return {
        "finished": record["finished"],
        "rates": [(n * end / steps / unit_s, float(rate)) for n, rate in enumerate(rates)],
        "mean": images / end,
        "step_s": end / steps,
        "unit": unit,
        "times": [
            (tick, CHART_LEFT + CHART_WIDTH * tick * unit_s / end)
            for tick in axis(end / unit_s)
            if tick * unit_s <= end
        ],
        "axis": rate_axis,
        "path": f"M{CHART_LEFT} {CHART_BOTTOM}{path}V{CHART_BOTTOM}Z",
    }


def _time_unit(seconds: float) -> tuple[str, int]:
    """The unit of a time axis, and its length in seconds."""
    if seconds < 120:
        return "seconds", 1
    return ("minutes", 60) if seconds < 3 * 3600 else ("hours", 3600)


def listed_shards(dataset: Dataset) -> tuple[dict[str, Shard], list[str]]:
    """The shards of the source now, by id; or a note that says why it cannot be listed."""
    try:
        return {shard.id: shard for shard in list_source(dataset.job, dataset.out).shards}, []
    except (VitrayError, OSError) as error:
        return {}, [f"The source cannot be listed, so there are no pictures: {one_line(error)}"]


def _state(dataset: Dataset, counts: Counts, shards: dict[str, Shard]) -> str:
    planned = select_shards(list(shards.values()), dataset.job)
    pending = len({shard.id for shard in planned} - set(counts.shards))
    if not counts.shards:
        return "empty: nothing is committed yet"
    if pending:
        return f"not complete: {pending:,} of {count_text(len(planned), 'shard')} still to do"
    return "complete" if is_complete(dataset) else "not complete"


def _shown(counts: Counts, groups: dict[str, list[tuple[int, list[Ref]]]]) -> list[Ref]:
    """The rows that have a card on the page."""
    refs = list[Ref]()
    for label, _ in counts.labels.most_common(GALLERY):
        refs += counts.by_label.get(label, [])
    refs += [ref for _, ref in counts.least_sure]
    for sized_groups in groups.values():
        for _, members in sized_groups:
            refs += members
    return list(dict.fromkeys(refs))


def _alike(counts: Counts) -> list[tuple[int, list[Ref]]]:
    """Groups of near vectors in the sample. Equal images count once."""
    if not counts.vectors:
        return []
    _, distinct = np.unique(counts.sampled_hashes, return_index=True)
    distinct.sort()
    groups = near_groups(np.concatenate(counts.vectors)[distinct])[:ALIKE]
    return [
        (len(group), [counts.sampled[distinct[n]] for n in group[:MEMBERS]]) for group in groups
    ]


def _runs(dataset: Dataset) -> dict[str, Any]:
    """The latest runs that computed something, and the time of each step over all such runs."""
    records = [record for record in read_run_records(dataset.out) if record.get("images")]
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.get("seconds_by_step", {}))
    images = sum(record["images"] for record in records)
    total = sum(seconds.values())
    steps = list[tuple[str, float, float, float]]()
    if total:
        steps = [(step, s, s / total, images / s if s else 0) for step, s in seconds.items()]
    latest = records[-RUNS:]
    return {
        "records": latest,
        "earlier": max(0, len(records) - RUNS),
        "axis": axis(max((record["images_per_s"] for record in latest), default=1)),
        "steps": steps,
        "images": images,
        "within": within(records[-1]) if records else None,
    }


def _calibration(counts: Counts) -> dict[str, Any] | None:
    """Bins of (rows, mean score, share right, low, high), and figures over all bins.

    low, high: the 95% interval of the share. gap: the mean difference of score and share. None
    without true labels.
    """
    bins = [
        (int(n), score / n, right / n, *wilson(right, n)) for n, right, score in counts.truth if n
    ]
    with_truth, right, _ = counts.truth.sum(0)
    if not bins:
        return None
    return {
        "bins": bins,
        "known": with_truth,
        "gap": sum(n * abs(score - share) for n, score, share, *_ in bins) / with_truth,
        "most": max(bins)[0],
        "accuracy": right / with_truth,
    }


def _map(counts: Counts) -> dict[str, Any]:
    """Points of the sample as one SVG path per label, on a square of 460 units.

    The most frequent labels have a path of their own, and come first.
    """
    points, how = on_a_plane(np.concatenate(counts.vectors))
    labels = np.array(counts.sampled_labels)
    named = [label for label, _ in Counter(counts.sampled_labels).most_common(SERIES)]
    series = [(label, points[labels == label]) for label in named]
    if (unnamed := points[~np.isin(labels, named)]).size:
        series.append((f"{len(set(counts.sampled_labels)) - len(named)} other labels", unnamed))
    paths = [(name, len(members), _dots(members)) for name, members in series]
    return {"series": paths, "how": how, "rows": len(points)}


def _dots(points: np.ndarray) -> str:
    """An SVG path with a dot at each point [N, 2] within 0 and 1, y upwards."""
    return "".join(f"M{10 + 460 * x:.1f} {470 - 460 * y:.1f}h0" for x, y in points)
