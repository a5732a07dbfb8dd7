"""An exported model beside its original: labels, vectors and speed on the user's images."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from vitray.errors import count
from vitray.evaluation.metrics import accuracy, largest_relative_error, mean_overlap
from vitray.models import Model, Predictions
from vitray.vectors import cosines

TOP = 5  # best labels whose overlap is measured
ROUNDS = 9  # of timing, at most
SECONDS = 30.0  # after which no round begins


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well an export agrees with its original. None: no labels, or no embeddings, to compare.

    labels: share of images with the same label. top5: mean share of the five best labels that both
    have. cosine, least_cosine: mean and least of all embeddings.
    """

    labels: float | None = None
    top5: float | None = None
    cosine: float | None = None
    least_cosine: float | None = None

    def share(self) -> float | None:
        """The figure that --min-agreement limits: of labels, or without labels the mean cosine."""
        return self.cosine if self.labels is None else self.labels

    def rows(self) -> list[tuple[str, str]]:
        """(figure, value), as text to show."""
        rows: list[tuple[str, str]] = []
        if self.labels is not None:
            rows.append(("same label", f"{self.labels:.2%}"))
        if self.top5 is not None:
            rows.append((f"shared {TOP} best labels", f"{self.top5:.2%} on average"))
        if self.cosine is not None:
            values = f"{self.cosine:.5f} on average, {self.least_cosine:.5f} at least"
            rows.append(("cosine of embeddings", values))
        return rows


@dataclass(frozen=True, slots=True)
class Size:
    """The size of an export's files. ratio: as a share of the original's."""

    megabytes: float
    ratio: float

    def row(self) -> tuple[str, str]:
        """(figure, value), as text to show."""
        return "size", f"{self.megabytes:.2f} MB, {self.ratio:.3f} of the original"


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of an export beside engine torch.

    ratio: how many times as fast, the median of alternating rounds; slowest and fastest of these
    rounds. images_s, torch_images_s: images per second of both.
    """

    ratio: float
    slowest: float
    fastest: float
    images_s: float
    torch_images_s: float

    def row(self, torch_precision: str) -> tuple[str, str]:
        """(figure, value), as text to show."""
        rounds = f"median of rounds ({self.slowest:.2f} to {self.fastest:.2f})"
        rates = f"{self.images_s:,.1f} images/s, torch {self.torch_images_s:,.1f}"
        return "speed", f"{self.ratio:.2f} times torch in {torch_precision}, {rounds}; {rates}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A ModelComparison as vitray_export.json stores it: each figure by its name there.

    apart: whether the images that calibrated it are others than those of the comparison. megabytes:
    its size; ratio: to the size of the original. agreement, top5, cosine, least_cosine: as in
    Agreement, whose `labels` is `agreement` here. error: the largest relative error in fp32. speed:
    how many times as fast as engine torch; slowest, fastest: of the rounds. images_s,
    torch_images_s: images per second of both.
    """

    images: int
    calibrated_on: int
    apart: bool
    megabytes: float
    ratio: float
    torch_precision: str
    precision: str | None
    agreement: float | None
    top5: float | None
    cosine: float | None
    least_cosine: float | None
    error: float | None
    speed: float | None
    slowest: float | None
    fastest: float | None
    images_s: float | None
    torch_images_s: float | None


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """An export beside engine torch in fp32, on `images` images. None: it cannot run here.

    calibrated_on, is_disjoint: images that calibrated it, and whether they are others than those of
    the comparison. precision, torch_precision: what the export (where not quantised) and engine
    torch compute in. error: the largest relative error of any result of any image, in fp32.
    """

    images: int
    calibrated_on: int
    is_disjoint: bool
    size: Size
    torch_precision: str
    precision: str | None = None
    agreement: Agreement | None = None
    error: float | None = None
    speed: Speed | None = None

    def share(self) -> float | None:
        """The figure that --min-agreement limits; None if there is none."""
        return None if self.agreement is None else self.agreement.share()

    def rows(self) -> list[tuple[str, str]]:
        """(figure, value), as text to show."""
        rows: list[tuple[str, str]] = []
        if self.share() is None:
            rows.append(("agreement", "not measured: this format does not run here"))
        else:
            rows.append(("compared on", f"{count(self.images, 'image')}{self._calibration_note()}"))
        if self.agreement is not None:
            rows += self.agreement.rows()
        if self.error is not None:
            rows.append(("relative error in fp32", f"{self.error:.1e} at most"))
        rows.append(self.size.row())
        if self.speed is not None:
            rows.append(self.speed.row(self.torch_precision))
        return rows

    def figures(self) -> Judgement:
        """The figures as they are stored and printed; None for each that was not measured."""
        agreement = self.agreement or Agreement()
        speed = self.speed
        return Judgement(
            images=self.images,
            calibrated_on=self.calibrated_on,
            apart=self.is_disjoint,
            megabytes=self.size.megabytes,
            ratio=self.size.ratio,
            torch_precision=self.torch_precision,
            precision=self.precision,
            agreement=agreement.labels,
            top5=agreement.top5,
            cosine=agreement.cosine,
            least_cosine=agreement.least_cosine,
            error=self.error,
            speed=None if speed is None else speed.ratio,
            slowest=None if speed is None else speed.slowest,
            fastest=None if speed is None else speed.fastest,
            images_s=None if speed is None else speed.images_s,
            torch_images_s=None if speed is None else speed.torch_images_s,
        )

    def _calibration_note(self) -> str:
        if not self.is_disjoint:
            return ", the same ones that calibrated it: give more than 64 to tell them apart"
        if self.calibrated_on:
            return f", none of the {self.calibrated_on} that calibrated it"
        return ""


def measure_agreement(expected: Predictions, computed: Predictions) -> Agreement:
    """How well the labels and vectors agree. Both with all labels."""
    labels: float | None = None
    top5: float | None = None
    if expected.ids is not None and computed.ids is not None:
        labels = accuracy(computed.ids[:, 0], expected.ids[:, 0])
        if expected.ids.shape[1] > TOP:
            expected_ids, computed_ids = expected.ids[:, :TOP], computed.ids[:, :TOP]
            top5 = mean_overlap(expected_ids.tolist(), computed_ids.tolist(), TOP)
    if not expected.vectors:
        return Agreement(labels, top5)
    pairs = ((vectors, computed.vectors[name]) for name, vectors in expected.vectors.items())
    values = np.stack([cosines(one, two) for one, two in pairs])
    return Agreement(labels, top5, float(values.mean()), float(values.min()))


def measure_error(expected: Predictions, computed: Predictions) -> float:
    """The largest relative error of an image: of its scores by label, and of each embedding."""
    errors = [
        largest_relative_error(vectors, computed.vectors[name])
        for name, vectors in expected.vectors.items()
    ]
    if expected.ids is not None and computed.ids is not None:
        errors.append(largest_relative_error(_by_label(expected), _by_label(computed)))
    return max(errors)


def measure_speed(exported: Model, original: Model, pixels: np.ndarray) -> Speed:
    """The speed of an export beside its original.

    The models alternate on the same images, so that other load on the machine slows both.
    """
    exported.predict(pixels)
    original.predict(pixels)
    exported_s: list[float] = []
    original_s: list[float] = []
    started = time.perf_counter()
    for _ in range(ROUNDS):
        exported_s.append(_seconds(exported, pixels))
        original_s.append(_seconds(original, pixels))
        if time.perf_counter() - started > SECONDS:
            break
    ratios = [slow / fast for fast, slow in zip(exported_s, original_s)]
    return Speed(
        ratio=statistics.median(ratios),
        slowest=min(ratios),
        fastest=max(ratios),
        images_s=len(pixels) / statistics.median(exported_s),
        torch_images_s=len(pixels) / statistics.median(original_s),
    )


def _seconds(model: Model, pixels: np.ndarray) -> float:
    started = time.perf_counter()
    model.predict(pixels)
    return time.perf_counter() - started


def _by_label(predictions: Predictions) -> np.ndarray:
    """float32 [N, C]: scores in the order of the labels."""
    assert predictions.ids is not None and predictions.scores is not None
    scores = np.empty_like(predictions.scores)
    np.put_along_axis(scores, predictions.ids.astype(np.int64), predictions.scores, axis=1)
    return scores
