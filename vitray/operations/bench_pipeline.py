"""The speed of the whole pipeline: runs on tars of a sample, in a scratch folder."""

from __future__ import annotations

import itertools
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO

from vitray.dataset import Dataset, parquet_of, read, require_dataset
from vitray.job import Job
from vitray.operations.bench_stages import StageRates
from vitray.pipeline import Progress
from vitray.schema import Encoded
from vitray.storage import join, store_for

GROWTH = 4  # factor by which each run has more images than the one before
SHARD_IMAGES = 512
SHARD_BYTES = 128 << 20  # at most; a tar is made in memory
SCRATCH_BYTES = 4 << 30  # of the longest run: what one machine can upload within minutes


@dataclass(frozen=True, slots=True)
class Launch:
    """What starts a run, and the folder that it may write to."""

    folder: str
    run: Callable[..., object]


@dataclass(frozen=True, slots=True)
class PipelineRate:
    """Images/s of the whole pipeline. first_rows_s: from the call to the first rows."""

    rate: float
    first_rows_s: float
    row_bytes: float
    fragment_rows: int


def measure_pipeline(
    job: Job, stages: StageRates, machines: int, seconds: float, launch: Launch
) -> PipelineRate:
    """The rate of runs on tars of the sample, each with GROWTH times the images of the one before.

    They stop when two of them differ by `seconds`. The rate is the slope between these two: what is
    in the queues at the first rows and at the end cancels out. The rates of the stages
    alone cannot give this number. A tiny ViT on Ray with two busy cores made 54 images/s, the model
    alone 3,500.
    """
    sample_images = len(stages.sample)
    images_for_time = min(stages.slowest * seconds, GROWTH * sample_images)
    images = int(max(sample_images, machines * images_for_time))
    most_images = max(GROWTH * images, SCRATCH_BYTES / stages.kilobytes / 1000)
    first_rows_s, shorter_s = _timed_run(job, stages.sample, images, launch)
    dataset = require_dataset(f"{launch.folder}/{images}/out")
    job = job.model_copy(update={"engine": dataset.spec.engine})
    while True:
        images *= GROWTH
        _, longer_s = _timed_run(job, stages.sample, images, launch)
        if longer_s - shorter_s >= seconds or images * GROWTH > most_images:
            break
        shorter_s = longer_s
    rate = (images - images // GROWTH) / max(1e-9, longer_s - shorter_s)
    return PipelineRate(rate, first_rows_s, _row_bytes(dataset), dataset.fragment_rows)


def _timed_run(job: Job, sample: list[Encoded], images: int, launch: Launch) -> tuple[float, float]:
    """Seconds from the call to the first rows of one run, and from these to the last rows."""
    folder = f"{launch.folder}/{images}"
    write_tars(f"{folder}/in", sample, images)
    sample_job = job_for_tars(job, f"{folder}/in", f"{folder}/out")
    timeline: list[tuple[float, int]] = []

    def record(progress: Progress) -> None:
        timeline.append((time.perf_counter(), progress.images))

    started = time.perf_counter()
    launch.run(sample_job, progress=record)
    final = timeline[-1][1]
    first = next(moment for moment, rows in timeline if rows)
    last = next(moment for moment, rows in timeline if rows == final)
    return first - started, last - first


def _row_bytes(dataset: Dataset) -> float:
    """Size of a row in Parquet, of distinct images only: a repeated row costs nearly nothing."""
    rows = read(dataset.out)
    rows = rows.slice(0, len(rows["content_hash"].unique()))
    return len(parquet_of(dataset, [rows], dict)[0]) / max(1, len(rows))


def job_for_tars(job: Job, source: str, out: str) -> Job:
    """The job for tars that `write_tars` wrote."""
    changes = {
        "source": [source],
        "out": out,
        "format": "tar",
        "image_member": None,
        "keep": [],
        "limit": None,
        "sample": None,
        "since": None,
        "max_error_rate": 1.0,
    }
    return job.model_copy(update=changes)


def images_per_tar(sample: Sequence[Encoded]) -> int:
    """How many images `write_tars` puts into a tar, at most."""
    mean_bytes = sum(len(image.data or b"") for image in sample) / len(sample)
    return max(1, min(SHARD_IMAGES, int(SHARD_BYTES / mean_bytes)))


def write_tars(folder: str, sample: Sequence[Encoded], images: int) -> None:
    """Write tars with `images` images: those of the sample, repeated."""
    repeated = itertools.islice(itertools.cycle(sample), images)
    tar_images = images_per_tar(sample)
    for number in range(-(-images // tar_images)):
        body = BytesIO()
        with tarfile.open(fileobj=body, mode="w") as tar:
            for index, image in enumerate(itertools.islice(repeated, tar_images)):
                data = image.data or b""
                member = tarfile.TarInfo(f"{index:06d}.jpg")  # of any format: content decides
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
        store_for(folder).create(join(folder, f"{number:05d}.tar"), body.getvalue())
