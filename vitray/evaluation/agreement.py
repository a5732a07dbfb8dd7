"""What a smaller model costs: its answers and its speed beside the original's, on images of the
user's own.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vitray.dataset import Dataset
from vitray.decoding.decode import decode
from vitray.errors import SourceError
from vitray.job import Job
from vitray.models import Model, Predictions
from vitray.schema import Encoded, ModelSpec, content_hash
from vitray.sources import chosen, estimate_images, list_shards, read_shard

CALIBRATION, JUDGED = 300, 500  # images at most; NNCF's own default is 300
ENOUGH = 64  # from so many images on none is used for both
LEAST = 16
DECODED = 32  # images at a time
SHARDS = 16  # that images are taken from, at most, spread evenly: classes often lie side by side
DEEP = 20  # times as many images as are taken of a tar, within which they are drawn
TOP = 5
ROUNDS, SECONDS = 9, 30.0  # of timing, at most


@dataclass(frozen=True, slots=True)
class Sample:
    """uint8 [N, H, W, 3]. apart: whether no judged image was used for calibration."""

    calibration: np.ndarray
    judged: np.ndarray
    apart: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of `images`, against engine torch in fp32. None where there is nothing to compare, or where
    the format cannot run here.

    agreement: share with the same label. top5: mean share of the original's five best labels that
    are among the export's.
    cosine, least_cosine: mean and least of all embeddings. error: largest relative error of any
    result of any image, computed in fp32.
    precision: what the export computes in where it is not quantised; torch_precision: what engine
    torch does in this job.
    speed: how many times as fast as engine torch: median of alternating rounds; slowest, fastest:
    of these rounds.
    """

    images: int
    calibrated_on: int
    apart: bool
    megabytes: float
    ratio: float
    torch_precision: str
    precision: str | None = None
    agreement: float | None = None
    top5: float | None = None
    cosine: float | None = None
    least_cosine: float | None = None
    error: float | None = None
    speed: float | None = None
    slowest: float | None = None
    fastest: float | None = None
    images_s: float | None = None
    torch_images_s: float | None = None

    def rows(self) -> list[tuple[str, str]]:
        """(what, value), for people."""
        used = (
            ""
            if self.apart
            else ", the same that it was calibrated on: give more than 64 to tell them apart"
        )
        if self.calibrated_on and self.apart:
            used = f", none of the {self.calibrated_on} that it was calibrated on"
        compared = self.agreement is not None or self.cosine is not None
        found = [("judged on", f"{self.images} images{used}")] if compared else []
        if self.agreement is not None:
            found.append(("same label", f"{self.agreement:.2%}"))
        if self.top5 is not None:
            found.append((f"shared {TOP} best labels", f"{self.top5:.2%} of them in the mean"))
        if self.cosine is not None:
            found.append(
                (
                    "cosine of embeddings",
                    f"{self.cosine:.5f} in the mean, {self.least_cosine:.5f} at least",
                )
            )
        if self.error is not None:
            found.append(("relative error in fp32", f"{self.error:.1e} at most"))
        if not compared:
            found.append(("answers", "not compared: this format does not run here"))
        found.append(("size", f"{self.megabytes:.2f} MB, {self.ratio:.3f} of the original"))
        if self.speed is not None:
            times = (
                f"{self.speed:.2f} times torch in {self.torch_precision}, median of rounds "
                f"({self.slowest:.2f} to {self.fastest:.2f})"
            )
            found.append(
                (
                    "speed",
                    f"{times}; {self.images_s:,.1f} images/s, torch {self.torch_images_s:,.1f}",
                )
            )
        return found

    def share(self) -> float | None:
        """What --min-agreement is held against: of labels, or without them the mean cosine."""
        return self.cosine if self.agreement is None else self.agreement


def sample(job: Job, spec: ModelSpec, calibrates: bool) -> Sample:
    """Images of the job's source. Raises SourceError when there are fewer than LEAST good ones."""
    decode_spec = Dataset(job.out, job, spec, (), pa.schema([]), 1).decode_spec
    most, found, seen = JUDGED + CALIBRATION * calibrates, list[np.ndarray](), set[bytes]()
    encoded = _encoded(job, most)
    while items := list(itertools.islice(encoded, DECODED)):
        fresh = {content_hash(item.data): item for item in items if item.data}
        pixels, _ = decode(
            [item for digest, item in fresh.items() if digest not in seen], decode_spec
        )
        seen |= fresh.keys()
        found += [np.array(image) for image in pixels]  # copies: the child writes there again
    if len(found) < LEAST:
        raise SourceError(
            f"--calibrate {', '.join(job.source)} holds {len(found)} good images that differ; a "
            f"judgement takes {LEAST} at least, "
            f"and {most} are good. Give more of the images that the model is for."
        )
    images = np.stack(found)
    if not calibrates:
        return Sample(images[:0], images, True)
    if len(images) < ENOUGH:
        return Sample(images, images, False)
    lot = _drawn(len(images), len(images) // max(2, round(len(images) / CALIBRATION)))
    return Sample(images[lot], np.delete(images, lot, 0), True)


def _encoded(job: Job, most: int) -> Iterator[Encoded]:
    """About so many, as many of one shard as of another, from anywhere in it: classes lie side by
    side, or take turns.

    Of a tar, which is read from its begin, within DEEP times as many.
    """
    shards = chosen(list_shards(job, []).shards, job)
    shards = shards[:: -(-len(shards) // SHARDS) or 1]
    each = -(-most // max(1, len(shards)))
    for shard in shards:
        rows = estimate_images([shard], job)[0] or each
        rows = min(rows, DEEP * each) if shard.kind == "tar" else rows
        places = set(_drawn(rows, min(each, rows)).tolist())
        items = read_shard(shard, job, places.__contains__)
        yield from itertools.islice(
            (item for item in items if isinstance(item, Encoded)), len(places)
        )


def _drawn(among: int, many: int) -> np.ndarray:
    """Places drawn at random, in order, the same ones each time."""
    return np.sort(np.random.default_rng(0).choice(among, many, replace=False))


def answers(expected: Predictions, found: Predictions) -> dict[str, float | None]:
    """agreement, top5, cosine and least_cosine of a Judgement. Both with all labels."""
    said: dict[str, float | None] = {
        "agreement": None,
        "top5": None,
        "cosine": None,
        "least_cosine": None,
    }
    if expected.ids is not None and found.ids is not None:
        said["agreement"] = float((expected.ids[:, 0] == found.ids[:, 0]).mean())
        if expected.ids.shape[1] > TOP:
            pairs = zip(expected.ids[:, :TOP].tolist(), found.ids[:, :TOP].tolist())
            said["top5"] = float(np.mean([len(set(a) & set(b)) / TOP for a, b in pairs]))
    if expected.vectors:
        cosines = np.stack(
            [_cosine(values, found.vectors[name]) for name, values in expected.vectors.items()]
        )
        said |= {"cosine": float(cosines.mean()), "least_cosine": float(cosines.min())}
    return said


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.asarray(
        (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-30)
    )


def error(expected: Predictions, found: Predictions) -> float:
    """The largest |found - expected| / |expected| of a row, of scores by label and of each
    embedding.
    """
    pairs = [(values, found.vectors[name]) for name, values in expected.vectors.items()]
    if expected.ids is not None and found.ids is not None:
        pairs.append((_by_label(expected), _by_label(found)))
    rows = [
        np.linalg.norm(b - a, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-30)
        for a, b in pairs
    ]
    return float(np.max(rows))


def _by_label(found: Predictions) -> np.ndarray:
    assert found.ids is not None and found.scores is not None
    scores = np.empty_like(found.scores)
    np.put_along_axis(scores, found.ids.astype(np.int64), found.scores, axis=1)
    return scores


def speeds(exported: Model, original: Model, pixels: np.ndarray) -> dict[str, float]:
    """The last five fields of a Judgement: both in turn on the same images, so that what else the
    machine does meets both.
    """
    took: dict[Model, list[float]] = {exported: [], original: []}
    for model in took:
        model.predict(pixels)
    started = time.perf_counter()
    for _ in range(ROUNDS):
        for model, seconds in took.items():
            before = time.perf_counter()
            model.predict(pixels)
            seconds.append(time.perf_counter() - before)
        if time.perf_counter() - started > SECONDS:
            break
    ratios = [b / a for a, b in zip(took[exported], took[original])]
    rates = dict(
        zip(
            ("images_s", "torch_images_s"),
            (len(pixels) / statistics.median(seconds) for seconds in took.values()),
        )
    )
    return {
        "speed": statistics.median(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        **rates,
    }
