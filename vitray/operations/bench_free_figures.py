"""The figures of `vitray bench --free-model`: arithmetic on timed runs, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from vitray.pipeline.worker import PREDICTORS

# ViT-B/16 in bf16 on an H200, by calculation and not measured: 35.1 GFLOP per image, at 43% of the
# 989 TFLOP/s in its data sheet.
H200_IMAGES_PER_S = 12_000.0
TARGET_S = 6.0  # of the difference between the two runs of a slope
LARGER = 4  # factor between the sizes of these two runs


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
    stage_s: seconds by stage, summed over its workers. shares: of its workers, as in the run
    record. stage_workers: see workers_by_stage.
    """

    images: int
    seconds: float
    first_rows_s: float
    cpu_s: float | None
    copied_bytes: int
    stage_s: Mapping[str, float]
    shares: Mapping[str, Any]
    stage_workers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Slope:
    """What each further image costs: start-up and shut-down cancel out.

    shares, stage_workers: as in TimedRun; stage_workers has the stages on which both runs agree.
    """

    images_per_s: float
    cpu_ms: float | None
    copied_bytes: float
    stage_ms: dict[str, float]
    shares: Mapping[str, Any]
    stage_workers: dict[str, float]


def slope(shorter: TimedRun, longer: TimedRun) -> Slope | None:
    """The costs of an image, from the difference of two runs.

    None where the longer run took no longer: other work on the machine disturbed them.
    """
    images = longer.images - shorter.images
    seconds = longer.seconds - shorter.seconds
    if seconds <= 0:
        return None
    cpu_ms = None
    if longer.cpu_s is not None and shorter.cpu_s is not None:
        cpu_ms = 1000 * (longer.cpu_s - shorter.cpu_s) / images
    return Slope(
        images_per_s=images / seconds,
        cpu_ms=cpu_ms,
        copied_bytes=(longer.copied_bytes - shorter.copied_bytes) / images,
        stage_ms={
            stage: 1000 * (seconds - shorter.stage_s.get(stage, 0.0)) / images
            for stage, seconds in longer.stage_s.items()
        },
        shares=longer.shares,
        stage_workers=_in_all([shorter.stage_workers, longer.stage_workers]),
    )


def _in_all(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The entries that all of them have."""
    return dict(set.intersection(*(set(each.items()) for each in counts)))


def ratios(ray: Mapping[int, Slope], local: Mapping[int, Slope]) -> list[float]:
    """Images/s on Ray / with the local executor, of each round that has both.

    Both by round. A round counts only where both gave their workers the same threads and processes.
    """
    return [
        ray[n].images_per_s / local[n].images_per_s
        for n in ray
        if n in local and ray[n].shares == local[n].shares
    ]


@dataclass(frozen=True, slots=True)
class WayFigures:
    """The medians of all rounds, for one way to run the pipeline.

    rounds: that could be measured. stages: milliseconds of each stage per image. stage_workers:
    threads or processes of each stage, as far as they are certain. busiest, busy: the stage whose
    workers are busy for the largest share of the time, and that share; "" and 0 unless the workers
    of all stages are certain. feeds_gpus: how many GPUs could be fed at this rate.
    """

    rounds: int
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
    stage_workers = _in_all([each.stage_workers for each in slopes])
    busy = busy_shares(stages, stage_workers, rate)
    busiest = max(busy, key=lambda stage: busy[stage], default="")
    return WayFigures(
        rounds=len(slopes),
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

    Empty unless the number of workers is there for all stages: the busiest one could be another.
    """
    if not stage_ms.keys() <= stage_workers.keys():
        return {}
    return {
        stage: milliseconds / 1000 * images_per_s / stage_workers[stage]
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
    rounds: that were tried. ratios: see the function; empty where only one way ran.
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


def workers_by_stage(shares: Mapping[str, Any], way: Way, shards: int) -> dict[str, float]:
    """How many threads or processes work on each stage, in all workers. Without uncertain ones.

    shares: those in the run record. shards: of the run.

    On a cluster all are uncertain: the record has the share of one machine, and other machines may
    read and decode, too. Decoder processes read by themselves, but leave fewer shards than there
    are processes to threads of their worker (process_decoders.py).
    """
    if way is Way.CLUSTER:
        return {}
    workers = float(shares["workers"])
    reads_in_processes = shares["decoder_processes"] and shards >= workers * shares["decoders"]
    return {
        "read": workers * shares["decoders" if reads_in_processes else "readers"],
        "decode": workers * shares["decoders"],
        "predict": workers * PREDICTORS,
        "stage": workers * shares["writers"],
    }
