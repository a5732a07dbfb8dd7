"""The figures of `vitray bench --free-model`: arithmetic on timed runs, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# ViT-B/16 in bf16 on an H200, by calculation and not measured: 35.1 GFLOP per image, at 43% of the
# 989 TFLOP/s in its data sheet.
H200_IMAGES_PER_S = 12_000.0
TARGET_S = 6.0  # of the difference between the two runs of a slope
LARGER = 4  # factor between the sizes of these two runs
SHARE_FIELDS = {"read": "readers", "decode": "decoders", "stage": "writers"}  # of a WorkerShare
PREDICTORS = 2  # threads of a worker that call its model, see pipeline/worker.py


class Way(StrEnum):
    """How the pipeline runs. The values are keys in the JSON output."""

    LOCAL = "local"
    LOCAL_RAY = "local_ray"
    CLUSTER = "cluster"


TITLES = {
    Way.LOCAL: "local executor",
    Way.LOCAL_RAY: "Ray, started here",
    Way.CLUSTER: "Ray at --address",
}


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run, from its first rows to its last.

    cpu_s: of the whole machine; None where it cannot be measured. copied_bytes: of pixels.
    stage_s: seconds by stage, summed over its workers.
    """

    images: int
    seconds: float
    first_rows_s: float
    cpu_s: float | None
    copied_bytes: int
    stage_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Slope:
    """What each further image costs: start-up and shut-down cancel out."""

    images_per_s: float
    cpu_ms: float | None
    copied_bytes: float
    stage_ms: dict[str, float]


def slope(shorter: TimedRun, longer: TimedRun) -> Slope:
    """The costs of an image, from the difference of two runs."""
    images = longer.images - shorter.images
    cpu_ms = None
    if longer.cpu_s is not None and shorter.cpu_s is not None:
        cpu_ms = 1000 * (longer.cpu_s - shorter.cpu_s) / images
    return Slope(
        images_per_s=images / max(1e-9, longer.seconds - shorter.seconds),
        cpu_ms=cpu_ms,
        copied_bytes=(longer.copied_bytes - shorter.copied_bytes) / images,
        stage_ms={
            stage: 1000 * (seconds - shorter.stage_s.get(stage, 0.0)) / images
            for stage, seconds in longer.stage_s.items()
        },
    )


@dataclass(frozen=True, slots=True)
class WayFigures:
    """The medians of all rounds, for one way to run the pipeline.

    stages: milliseconds of each stage per image. stage_workers: threads of each stage.
    busiest, busy: the stage whose workers are busy for the largest share of the time, and that
    share. feeds_gpus: how many GPUs could be fed at this rate.
    """

    images_per_s: float
    slowest_images_per_s: float
    fastest_images_per_s: float
    cpu_ms_per_image: float | None
    copied_bytes_per_image: float
    stages: dict[str, float]
    stage_workers: dict[str, float]
    busiest: str
    busy: float
    feeds_gpus: float
    first_rows_s: float


def way_figures(
    slopes: Sequence[Slope],
    first_rows_s: Sequence[float],
    stage_workers: dict[str, float],
    gpu_images_per_s: float,
) -> WayFigures:
    """The medians of the slopes of all rounds."""
    rates = [each.images_per_s for each in slopes]
    rate = statistics.median(rates)
    cpu_ms = [each.cpu_ms for each in slopes if each.cpu_ms is not None]
    stages = {
        stage: statistics.median([each.stage_ms.get(stage, 0.0) for each in slopes])
        for stage in slopes[-1].stage_ms
    }
    busy = busy_shares(stages, stage_workers, rate)
    busiest = max(busy, key=lambda stage: busy[stage], default="")
    return WayFigures(
        images_per_s=rate,
        slowest_images_per_s=min(rates),
        fastest_images_per_s=max(rates),
        cpu_ms_per_image=statistics.median(cpu_ms) if cpu_ms else None,
        copied_bytes_per_image=statistics.median([each.copied_bytes for each in slopes]),
        stages=stages,
        stage_workers=stage_workers,
        busiest=busiest,
        busy=min(1.0, busy.get(busiest, 0.0)),  # short runs are noisy
        feeds_gpus=rate / gpu_images_per_s,
        first_rows_s=statistics.median(first_rows_s),
    )


def busy_shares(
    stage_ms: Mapping[str, float], stage_workers: Mapping[str, float], images_per_s: float
) -> dict[str, float]:
    """The share of the time in which the workers of each stage are busy.

    A stage of which the number of workers is not known counts as one worker.
    """
    return {
        stage: milliseconds / 1000 * images_per_s / stage_workers.get(stage, 1.0)
        for stage, milliseconds in stage_ms.items()
    }


def gpu_rate(microseconds: int) -> float:
    """Images/s of one GPU with this time per image; of a ViT-B/16 on an H200 for 0."""
    return 1e6 / microseconds if microseconds else H200_IMAGES_PER_S


def run_sizes(images_per_s: float, least: int, most: float, seconds: float) -> tuple[int, int]:
    """The images of a shorter and a longer run that differ by about `seconds` at this rate.

    least: of the shorter run. most: of the longer run.
    """
    shorter = min(images_per_s * seconds / (LARGER - 1), most / LARGER)
    shorter = max(least, int(shorter))
    return shorter, LARGER * shorter


@dataclass(frozen=True)
class FreeBench:
    """The result of `bench_free`.

    images: different ones of the source. sizes: the images of the shorter and of the longer run.
    ratios: of each round, images/s on Ray / with the local executor; empty where only one ran.
    """

    microseconds: int
    images: int
    kilobytes: float
    images_per_tar: int
    sizes: tuple[int, int]
    rounds: int
    cores: int
    gpu_images_per_s: float
    ways: dict[str, WayFigures]
    ratios: list[float]

    def __str__(self) -> str:
        lines = [self._title(), "", _HEADER]
        lines += [_row(TITLES[Way(way)], figures) for way, figures in self.ways.items()]
        lines += ["", self._gpu_note()]
        if self.ratios:
            low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
            lines.append(f"Ray / local executor: {middle:.2f} ({low:.2f} to {high:.2f})")
        return "\n".join(lines)

    def _title(self) -> str:
        cost = f"waits {self.microseconds} µs per image" if self.microseconds else "costs nothing"
        shorter, longer = self.sizes
        return (
            f"with a model that {cost}: slope from {shorter:,} to {longer:,} images of "
            f"{self.kilobytes:.0f} kB, tars of {self.images_per_tar}, rounds: {self.rounds}, "
            f"cores here: {self.cores}"
        )

    def _gpu_note(self) -> str:
        what = "a GPU that waits as long"
        if not self.microseconds:
            what = "a ViT-B/16 on an H200, by calculation"
        return f"GPUs fed: at {self.gpu_images_per_s:,.0f} images/s, {what}"


_HEADER = (
    f"{'':18}{'images/s':>10}{'CPU ms/image':>14}{'bytes copied/image':>20}{'GPUs fed':>10}"
    "   busiest stage"
)


def _row(title: str, figures: WayFigures) -> str:
    busiest = f"{figures.busiest}, {figures.busy:.0%} of the time" if figures.busiest else "-"
    cpu_ms = "-" if figures.cpu_ms_per_image is None else f"{figures.cpu_ms_per_image:.2f}"
    return (
        f"{title:18}{figures.images_per_s:10,.1f}{cpu_ms:>14}"
        f"{figures.copied_bytes_per_image:20,.0f}{figures.feeds_gpus:10.2f}   {busiest}"
    )


def workers_by_stage(shares: Mapping[str, Any]) -> dict[str, float]:
    """How many threads work on each stage, in all workers. shares: those in the run record."""
    workers = float(shares["workers"])
    threads = {stage: workers * shares[field] for stage, field in SHARE_FIELDS.items()}
    return {**threads, "predict": workers * PREDICTORS}
