"""An exported model beside its original: labels, vectors and speed on the user's images."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from vitray.evaluation.metrics import accuracy, largest_relative_error, mean_overlap
from vitray.models import Model, Predictions
from vitray.vectors import cosines

TOP = 5  # best labels whose overlap is measured
ROUNDS = 9  # of timing, at most
SECONDS = 30.0  # after which no round begins


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """An export beside engine torch in fp32, on `images`. None: nothing to compare, or cannot run.

    calibrated_on, apart: images that calibrated it, and whether they are others than `images`.
    megabytes, ratio: size of its files, and as a share of the original's.
    precision, torch_precision: what the export (where not quantised) and engine torch compute in.
    agreement: share of images with the same label. top5: mean share of the five best labels that
    both have. cosine, least_cosine: mean and least of all embeddings.
    error: the largest relative error of any result of any image, computed in fp32.
    speed: how many times as fast as engine torch, the median of alternating rounds; slowest and
    fastest of these rounds.
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
        """(figure, value), as text to show."""
        return [*self._agreement_rows(), *self._cost_rows()]

    def share(self) -> float | None:
        """The figure that --min-agreement limits: of labels, or without labels the mean cosine."""
        return self.cosine if self.agreement is None else self.agreement

    def _agreement_rows(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        if self.agreement is None and self.cosine is None:
            rows.append(("agreement", "not measured: this format does not run here"))
        else:
            rows.append(("compared on", f"{self.images} images{self._calibration_note()}"))
        if self.agreement is not None:
            rows.append(("same label", f"{self.agreement:.2%}"))
        if self.top5 is not None:
            rows.append((f"shared {TOP} best labels", f"{self.top5:.2%} on average"))
        if self.cosine is not None:
            values = f"{self.cosine:.5f} on average, {self.least_cosine:.5f} at least"
            rows.append(("cosine of embeddings", values))
        if self.error is not None:
            rows.append(("relative error in fp32", f"{self.error:.1e} at most"))
        return rows

    def _calibration_note(self) -> str:
        if not self.apart:
            return ", the same ones that calibrated it: give more than 64 to tell them apart"
        if self.calibrated_on:
            return f", none of the {self.calibrated_on} that calibrated it"
        return ""

    def _cost_rows(self) -> list[tuple[str, str]]:
        rows = [("size", f"{self.megabytes:.2f} MB, {self.ratio:.3f} of the original")]
        if self.speed is not None:
            rounds = f"median of rounds ({self.slowest:.2f} to {self.fastest:.2f})"
            rates = f"{self.images_s:,.1f} images/s, torch {self.torch_images_s:,.1f}"
            times = f"{self.speed:.2f} times torch in {self.torch_precision}"
            rows.append(("speed", f"{times}, {rounds}; {rates}"))
        return rows


def measure_agreement(expected: Predictions, computed: Predictions) -> dict[str, float | None]:
    """agreement, top5, cosine and least_cosine of a ModelComparison. Both with all labels."""
    agreement: dict[str, float | None] = {
        "agreement": None,
        "top5": None,
        "cosine": None,
        "least_cosine": None,
    }
    if expected.ids is not None and computed.ids is not None:
        agreement["agreement"] = accuracy(computed.ids[:, 0], expected.ids[:, 0])
        if expected.ids.shape[1] > TOP:
            expected_ids, computed_ids = expected.ids[:, :TOP], computed.ids[:, :TOP]
            agreement["top5"] = mean_overlap(expected_ids.tolist(), computed_ids.tolist(), TOP)
    if expected.vectors:
        pairs = ((vectors, computed.vectors[name]) for name, vectors in expected.vectors.items())
        values = np.stack([cosines(one, two) for one, two in pairs])
        agreement |= {"cosine": float(values.mean()), "least_cosine": float(values.min())}
    return agreement


def measure_error(expected: Predictions, computed: Predictions) -> float:
    """The largest relative error of an image: of its scores by label, and of each embedding."""
    errors = [
        largest_relative_error(vectors, computed.vectors[name])
        for name, vectors in expected.vectors.items()
    ]
    if expected.ids is not None and computed.ids is not None:
        errors.append(largest_relative_error(_by_label(expected), _by_label(computed)))
    return max(errors)


def measure_speed(exported: Model, original: Model, pixels: np.ndarray) -> dict[str, float]:
    """The last five fields of a ModelComparison.

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
    return {
        "speed": statistics.median(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        "images_s": len(pixels) / statistics.median(exported_s),
        "torch_images_s": len(pixels) / statistics.median(original_s),
    }


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
