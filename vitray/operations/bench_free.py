"""The speed of the pipeline alone: whole runs with a model that costs nothing.

The runs read tars of a sample of the source, and write to a scratch folder.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from vitray.cpus import cores
from vitray.dataset import drop_scratch, read_run_records, scratch
from vitray.decoding.decode import ON_DEVICE
from vitray.errors import JobError, count
from vitray.job import PROMPT, Job
from vitray.models import resolve_device, usable_gpus
from vitray.models.free import free_spec
from vitray.operations.bench_free_figures import (
    TARGET_S,
    TITLES,
    FreeBench,
    Slope,
    TimedRun,
    Way,
    gpu_rate,
    ratios,
    run_sizes,
    slope,
    way_figures,
    workers_by_stage,
)
from vitray.operations.bench_pipeline import (
    GROWTH,
    SCRATCH_BYTES,
    images_per_tar,
    job_for_tars,
    write_tars,
)
from vitray.operations.bench_stages import mean_kilobytes, read_sample
from vitray.pipeline import Progress, joined_cluster, run
from vitray.schema import Encoded
from vitray.storage import store_for

WARM_UP_S = 1.0  # a shorter run is no measure of the rate
ROUNDS = 3  # the median of two would be their mean
ATTEMPTS = 3  # at a pair of runs, until the longer one takes longer


def bench_free(
    job: Job,
    microseconds: int = 0,
    images: int = 256,
    address: str | None = None,
    allow_open_cluster: bool = False,
    *,
    seconds: float = TARGET_S,
    rounds: int = ROUNDS,
    folder: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> FreeBench:
    """The rate of the pipeline with a model that waits `microseconds` per image.

    Two runs of different sizes give a slope, in which start-up cancels out. Without an address the
    local executor and a Ray that each run starts are measured, in alternation.

    CPU seconds are those of the whole machine but idle and waiting for disks (/proc/stat). Those of
    a process tree would miss what Ray's processes spent before they died, because Ray does not wait
    for them. So the measurement needs the machine for itself. At an address they are not measured.

    images: of the source, repeated. seconds: by which the two runs differ, about.
    folder: for copies of the images, up to 4 GB; a temporary one if it is not given.
    report: gets a line of text now and then.

    Raises JobError for a `decode` that needs a GPU, for a source without a good image, and where no
    longer run took longer than its shorter one. Raises what `run` raises.
    """
    job = _with_free_model(job)
    sample, _ = read_sample(job, images)
    with _scratch_folder(job, address, allow_open_cluster, folder) as scratch_folder:
        runs = runs_by_way(microseconds, address, allow_open_cluster)
        launcher = _Launcher(job, sample, scratch_folder, runs)
        ways = list(runs)
        report(f"looking for the number of images that takes {seconds:g} s")
        sizes = _sizes(launcher, ways[0], seconds)
        slopes = dict[Way, dict[int, Slope]]({way: {} for way in ways})
        for number in range(rounds):
            for way in ways:
                report(
                    f"round {number + 1} of {rounds}, {way.value}: {sizes[0]:,} and {sizes[1]:,} "
                    "images"
                )
                if (measured := launcher.measured_slope(way, sizes)) is not None:
                    slopes[way][number] = measured
    rate = gpu_rate(microseconds)
    figures = {
        way.value: way_figures(_some(slopes[way], way), launcher.first_rows_s[way], rate)
        for way in ways
    }
    return FreeBench(
        microseconds=microseconds,
        images=len(sample),
        kilobytes=mean_kilobytes(sample),
        images_per_tar=images_per_tar(sample),
        sizes=sizes,
        rounds=rounds,
        cores=cores(),
        gpu_images_per_s=rate,
        ways=figures,
        ratios=ratios(slopes.get(Way.LOCAL_RAY, {}), slopes.get(Way.LOCAL, {})),
    )


def _with_free_model(job: Job) -> Job:
    """The job, with the labels of the free model in place of its own."""
    if job.decode in ON_DEVICE:
        raise JobError(
            f"decode: {job.decode} decodes on the GPU, which the free model does not use. "
            "Add --set decode=exact or --set decode=fast."
        )
    changes: dict[str, Any] = {
        "labels": job.labelled,
        "prompts": [PROMPT],
        "head": None,
        "revision": None,
        "precision": "auto",
        "engine": "auto",
        "batch_size": "auto",
        "compile": "off",
    }
    return job.model_copy(update=changes)


def runs_by_way(
    microseconds: int, address: str | None, allow_open_cluster: bool
) -> dict[Way, Callable[..., object]]:
    """What starts a run, for each way that is to be measured."""
    run_free = partial(run, spec=free_spec(microseconds))
    if address is None:
        return {Way.LOCAL: run_free, Way.LOCAL_RAY: partial(run_free, address="local")}
    if address == "local":
        return {Way.LOCAL_RAY: partial(run_free, address=address)}
    there = partial(run_free, address=address, allow_open_cluster=allow_open_cluster)
    return {Way.CLUSTER: there}


@contextlib.contextmanager
def _scratch_folder(
    job: Job, address: str | None, allow_open: bool, folder: str | None
) -> Iterator[str]:
    """A folder that all machines see: on a cluster it lies in `out`, and the cluster is joined."""
    if folder is not None and (address is None or address == "local"):
        yield folder
        return
    if address is None or address == "local":
        with tempfile.TemporaryDirectory(prefix="vitray-bench-") as temporary:
            yield temporary
        return
    drop_scratch(job.out)
    with joined_cluster(address, allow_open, job.device), scratch(job.out) as shared:
        yield shared


def _sizes(launcher: _Launcher, way: Way, seconds: float) -> tuple[int, int]:
    """The images of the two runs: about as many as differ by `seconds`.

    The runs before that fill caches, too.
    """
    most_images = SCRATCH_BYTES / 1000 / mean_kilobytes(launcher.sample)
    images = len(launcher.sample)
    while True:
        timed = launcher.timed_run(way, images)
        if timed.seconds >= min(WARM_UP_S, seconds) or images * GROWTH > most_images:
            break
        images *= GROWTH
    rate = timed.images / timed.seconds if timed.seconds > 0 else math.inf
    return run_sizes(rate, len(launcher.sample), most_images, seconds)


def _some(slopes: dict[int, Slope], way: Way) -> list[Slope]:
    """The slopes of all rounds. Raises JobError if there is none."""
    if not slopes:
        raise JobError(
            f"{TITLES[way]}: the longer run never took longer than the shorter one. Stop other "
            "work on this machine, or give a larger --seconds."
        )
    return list(slopes.values())


@dataclass(frozen=True, slots=True)
class Moment:
    """Seconds of the clock, and CPU seconds of the machine."""

    seconds: float
    cpu_s: float


class Recorder:
    """Notes when the first and the last rows of a run come.

    Called at every report of a run with `images` images. It reads the machine's counters only at
    these two, because that costs what it measures. progress: the last state.
    """

    def __init__(self, images: int, now: Callable[[], Moment]) -> None:
        self.progress = Progress()
        self.first: Moment | None = None
        self.last: Moment | None = None
        self._images = images
        self._now = now

    def __call__(self, progress: Progress) -> None:
        self.progress = progress
        if progress.images and self.first is None:
            self.first = self._now()
        if progress.images >= self._images and self.last is None:
            self.last = self._now()


class _Launcher:
    """Makes timed runs on tars of the sample, in a folder.

    runs: what starts a run, by way. first_rows_s: of the runs of slopes, by way.
    """

    def __init__(
        self, job: Job, sample: list[Encoded], folder: str, runs: dict[Way, Callable[..., object]]
    ) -> None:
        self.sample = sample
        self.first_rows_s: dict[Way, list[float]] = {way: [] for way in runs}
        self._job = job
        self._folder = folder
        self._runs = runs
        self._made: set[int] = set()

    def measured_slope(self, way: Way, sizes: tuple[int, int]) -> Slope | None:
        """The slope between runs of these sizes; None after ATTEMPTS that were disturbed."""
        for _ in range(ATTEMPTS):
            shorter, longer = (self.timed_run(way, size) for size in sizes)
            self.first_rows_s[way] += [shorter.first_rows_s, longer.first_rows_s]
            if (measured := slope(shorter, longer)) is not None:
                return measured
        return None

    def timed_run(self, way: Way, images: int) -> TimedRun:
        """One run on so many images. Its output is removed again."""
        job = self._job_for(way, images)
        recorder = Recorder(images, machine_moment)
        started = time.perf_counter()
        self._runs[way](job, progress=recorder)
        progress = recorder.progress
        if not progress.good:
            raise JobError(
                f"none of the first {count(len(self.sample), 'image')} can be decoded. "
                "Check `source` and the job."
            )
        last = recorder.last or machine_moment()
        first = recorder.first or last
        shares = read_run_records(job.out)[0]["shares"]
        store_for(job.out).delete_tree(job.out)
        shards = math.ceil(images / images_per_tar(self.sample))
        return TimedRun(
            images=progress.images,
            seconds=last.seconds - first.seconds,
            first_rows_s=first.seconds - started,
            cpu_s=None if way is Way.CLUSTER else last.cpu_s - first.cpu_s,
            copied_bytes=progress.copied_bytes,
            stage_s=dict(progress.seconds),
            shares=shares,
            stage_workers=workers_by_stage(shares, way, shards),
        )

    def _job_for(self, way: Way, images: int) -> Job:
        """The job of a run on tars with so many images, which are made once."""
        source = f"{self._folder}/{images}"
        if images not in self._made:
            write_tars(source, self.sample, images)
            self._made.add(images)
        job = job_for_tars(self._job, source, f"{self._folder}/out")
        if way is Way.LOCAL and usable_gpus(resolve_device(job.device)) > 1:
            return job.model_copy(update={"device": "cpu"})  # else it would run on Ray
        return job


def machine_moment() -> Moment:
    return Moment(time.perf_counter(), machine_cpu_s())


def machine_cpu_s() -> float:
    """CPU seconds that this machine has spent since it started, in all processes."""
    import psutil

    times = psutil.cpu_times()
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")  # guests are part of `user`
    return float(sum(value for name, value in times._asdict().items() if name not in idle))
