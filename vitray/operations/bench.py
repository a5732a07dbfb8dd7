"""Where the time goes: images/s of each step alone, of the whole line, and which step is the limit.

All on the same images: the first ones of the job's source, encoded as they are. What is written is
removed again.
"""

from __future__ import annotations

import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO

import numpy as np
import pyarrow as pa

from vitray.dataset import (
    Dataset,
    drop_scratch,
    parquet_of,
    read,
    require_dataset,
    scratch,
    with_frozen,
)
from vitray.decoding.decode import ON_DEVICE, decode
from vitray.errors import JobError
from vitray.job import Job
from vitray.models import (
    identify,
    open_model,
    runs_on,
    torch_threads_kept,
    vector_columns,
    with_label_names,
)
from vitray.pipeline import joined, on_machine, prepared, run
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard
from vitray.storage import is_local, join, store_for

LINE_GROWS = 4  # each run of the whole line has so many times the images of the one before
SHARD_IMAGES, SHARD_BYTES = 512, 128 << 20  # at most; a tar is made in memory
SCRATCH_BYTES = 4 << 30  # of the longest: what one machine can upload within minutes
# of the model at a time, as in the line: one's batches are computed while the other's last one ends
CALLERS = 2
NEAR = 0.9  # of what the steps alone allow: a line slower than that loses time between them

ADVICE = {
    "read": "larger shards, a store nearby, or more machines",
    "decode": "more cores for each accelerator, decode: fast (or draft for photos of many "
    "megapixels)",
    "model": "an accelerator, precision: bf16, another engine, or a smaller model",
    "line": "seconds_by_step, which a run leaves in OUT/_vitray/runs, tells what waits; larger "
    "shards "
    "and fragment_rows help",
}


@dataclass(frozen=True)
class Bench:
    """Images/s, unless named otherwise. ceiling: of the matrix products alone; first_rows_s: from
    the call to the first staged rows.
    """

    images: int
    kilobytes: float
    cores: int
    device: str
    engine: str
    precision: str
    batch_size: int
    decode_mode: str
    read: float
    decode_core: float
    decode: float
    model: float
    ceiling: float
    gflops: float
    line: float
    first_rows_s: float
    identify_s: (
        float  # imports, reading the checkpoint, and timing the engines where `auto` has several
    )
    out_kilobytes: float  # of a row, in Parquet
    fragment_rows: int
    limit: str  # read, decode or model: the slowest alone; line: what lies between the steps
    gpus: int = 1  # that `model` is of; 0 on a CPU
    machines: int = 1  # that `line` is the mean of
    measured: str = "on this machine"

    def __str__(self) -> str:
        share = " (the CPU's share)" if self.decode_mode in ON_DEVICE else ""
        model = f"{self.engine}, {self.precision}, batch {self.batch_size}, {self.device}"
        ceiling = (
            f"{self.gflops:,.0f} GFLOP/s of matrix products: the model has "
            f"{self.model / self.ceiling:.2f}"
        )
        line = (
            f"{self.line / self.model:.2f} of the model alone; first rows after "
            f"{self.first_rows_s:.1f} s"
        )
        rows = [
            (
                "read",
                self.read,
                f"the first {self.images} images of the source, "
                f"{self.read * self.kilobytes / 1000:.0f} MB/s",
            ),
            ("decode, 1 core", self.decode_core, self.decode_mode),
            (f"decode, {self.cores} cores", self.decode, self.decode_mode + share),
            ("model alone", self.model, model),
            ("ceiling", self.ceiling, ceiling),
            ("whole line", self.line, line),
        ]
        table = [f"{name:18}{rate:12,.1f} images/s   {note}" for name, rate, note in rows]
        return "\n".join([*table, f"limit: {self.limit}. To change that: {ADVICE[self.limit]}"])


def bench(job: Job, images: int = 256, seconds: float = 6.0, near: str = "") -> Bench:
    """Time every step alone, for so many seconds, and together, on the first `images` of the
    source. Wants the whole machine.

    near: where that is on S3 the whole line reads and writes within it, as a run would, and else in
    the temporary directory.
    Raises JobError when the source holds no image, and what `run` raises.
    """
    alone = _alone(with_frozen(job), images, seconds, len(os.sched_getaffinity(0)))
    frozen = alone.dataset.job.model_copy(update={"engine": alone.dataset.spec.engine})
    if near:
        drop_scratch(near)
    with (
        tempfile.TemporaryDirectory(prefix="vitray-bench-")
        if is_local(near)
        else scratch(near) as folder
    ):
        return _bench(alone, _line(frozen, alone, 1, seconds, _Start(folder, run)))


def bench_cluster(
    job: Job, address: str, images: int, seconds: float, allow_open_cluster: bool = False
) -> Bench:
    """The same of a Ray cluster: every step alone on one whole machine of it, and the whole line on
    all of it.

    The line runs on tars of the sample in OUT/_vitray/probe-<random>, since where OUT is a run
    would write too. It is removed afterwards, and what killed ones left before. identify_s: until
    Ray had let us in; first_rows_s has the rest.
    Raises what `bench` and `run` raise, so ClusterError where OUT is not seen by all machines.
    """
    job, started = with_frozen(with_label_names(prepared(job))), time.perf_counter()
    drop_scratch(job.out)
    with joined(address, allow_open_cluster, job.device) as machine:
        joined_s = time.perf_counter() - started
        alone: _Alone = on_machine(machine, _alone, job, images, seconds, machine.cpus)
        there = partial(run, address=address, allow_open_cluster=allow_open_cluster)
        with scratch(job.out) as folder:
            line = _line(
                job, alone, machine.alike * max(1, machine.gpus), seconds, _Start(folder, there)
            )
    each = replace(line, rate=line.rate / machine.alike)
    others = f" and others: {machine.others}" if machine.others else ""
    return replace(
        _bench(replace(alone, identify_s=joined_s), each, max(1, machine.gpus)),
        machines=machine.alike,
        measured=f"on Ray at {address}: each step alone on {machine.host} (CPUs: {machine.cpus}, "
        f"GPUs: "
        f"{machine.gpus}), "
        f"the whole line on all machines of that size: {machine.alike}{others}",
    )


@dataclass(frozen=True, slots=True)
class _Alone:
    """What one machine does in each step by itself, images/s, one GPU at most; flops: FLOP/s of the
    matrix products.
    """

    dataset: Dataset
    sample: list[Encoded]
    device: str
    cores: int
    identify_s: float
    read: float
    decode_core: float
    decode: float
    model: float
    ceiling: float
    flops: float

    @property
    def kilobytes(self) -> float:
        return sum(len(one.data or b"") for one in self.sample) / len(self.sample) / 1000

    @property
    def steps(self) -> dict[str, float]:
        on_device = self.dataset.job.decode in ON_DEVICE  # what was timed is the CPU's share
        return {
            "read": self.read,
            **({} if on_device else {"decode": self.decode}),
            "model": self.model,
        }

    @property
    def slowest(self) -> float:
        return min(self.steps.values())


@dataclass(frozen=True, slots=True)
class _Start:
    """What starts a run, and the folder that it may write to."""

    folder: str
    run: Callable[..., object]


@dataclass(frozen=True, slots=True)
class _Line:
    rate: float
    first_s: float
    row_bytes: float
    fragment_rows: int


def _alone(job: Job, images: int, seconds: float, cores: int) -> _Alone:
    sample, read = _read(job, images)
    started = time.perf_counter()
    spec, device = identify(job), runs_on(job)
    identify_s = time.perf_counter() - started
    dataset = Dataset(
        job.out, job, spec, tuple(vector_columns(job, spec)), pa.schema([]), len(sample)
    )
    if not any(
        len(decode(sample[n : n + 32], dataset.decode_spec)[0]) for n in range(0, len(sample), 32)
    ):
        reason = decode(sample[:1], dataset.decode_spec)[1][0].reason
        raise JobError(
            f"none of the first {len(sample)} images can be decoded ({reason}). Check `source` "
            f"and the job."
        )
    decode_core, decode_all = (
        _decode(dataset, sample, threads, seconds / 2) for threads in (1, cores)
    )
    from vitray.models.roofline import roofline  # loads torch

    before = roofline(spec, device)  # twice, since other work on the machine comes and goes
    model = _model(dataset, device, cores, seconds)
    most, flops = (sum(pair) / 2 for pair in zip(before, roofline(spec, device)))
    return _Alone(
        dataset,
        sample,
        device,
        cores,
        identify_s,
        read,
        decode_core,
        decode_all,
        model,
        most,
        flops,
    )


def _bench(alone: _Alone, line: _Line, gpus: int = 1) -> Bench:
    """What one machine with so many GPUs comes to, and what its limit is."""
    spec, job = alone.dataset.spec, alone.dataset.job
    steps = alone.steps | {"model": gpus * alone.model}
    if line.rate > alone.read:  # one reader alone; the line has several
        del steps["read"]
    slowest = min(steps, key=lambda step: steps[step])
    # on a CPU the cores are shared
    together = (
        steps[slowest]
        if alone.device != "cpu"
        else min(steps[slowest], 1 / (1 / alone.decode + 1 / alone.model))
    )
    return Bench(
        images=len(alone.sample),
        kilobytes=alone.kilobytes,
        cores=alone.cores,
        device=alone.device,
        engine=spec.engine,
        precision=spec.precision,
        batch_size=spec.batch_size,
        decode_mode=job.decode,
        read=alone.read,
        decode_core=alone.decode_core,
        decode=alone.decode,
        model=gpus * alone.model,
        ceiling=gpus * alone.ceiling,
        gflops=gpus * alone.flops / 1e9,
        line=line.rate,
        first_rows_s=line.first_s,
        identify_s=alone.identify_s,
        out_kilobytes=line.row_bytes / 1000,
        fragment_rows=line.fragment_rows,
        limit=slowest if line.rate >= NEAR * together else "line",
        gpus=gpus * (alone.device != "cpu"),
    )


def _read(job: Job, images: int) -> tuple[list[Encoded], float]:
    def encoded() -> Iterator[Encoded]:
        for shard in list_shards(job, []).shards:
            for item in read_shard(shard, job, lambda _: True):
                if isinstance(item, Encoded) and item.data:
                    yield item

    started = time.perf_counter()
    sample = list(itertools.islice(encoded(), images))
    if not sample:
        raise JobError(
            f"{', '.join(job.source)} holds no image to measure with. Check `source` and `format`."
        )
    return sample, len(sample) / (time.perf_counter() - started)


def _decode(dataset: Dataset, sample: list[Encoded], threads: int, seconds: float) -> float:
    """Each thread has a child of its own, as in the line."""
    parts = [sample[n : n + 32] for n in range(0, len(sample), 32)]
    parts *= -(-4 * threads // len(parts))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: decode(part, dataset.decode_spec), parts[:threads]))
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            done += sum(
                len(outcomes)
                for _, outcomes in pool.map(lambda part: decode(part, dataset.decode_spec), parts)
            )
        return done / (time.perf_counter() - started)


def _model(dataset: Dataset, device: str, threads: int, seconds: float) -> float:
    """On what the line gives it at a time: four batches of synthetic pixels, from CALLERS threads.

    A slope, too: at the end of each run cores wait for the last batch.
    """
    spec, job = dataset.spec, dataset.job
    pixels = np.random.default_rng(0).integers(
        0, 256, (4 * spec.batch_size, *spec.pixels.shape, 3), dtype=np.uint8
    )
    with torch_threads_kept(), ThreadPoolExecutor(CALLERS) as pool:
        model = open_model(
            spec,
            list(dataset.vectors),
            job.top_k,
            job.labelled,
            device,
            threads,
            job.compile == "on",
        )

        def seconds_of(calls: int) -> float:
            started = time.perf_counter()
            list(pool.map(lambda _: model.predict(pixels), range(calls)))
            return time.perf_counter() - started

        model.predict(pixels)
        short_s = seconds_of(CALLERS)
        more = CALLERS * max(1, round(seconds / short_s))
        return more * len(pixels) / max(1e-9, seconds_of(CALLERS + more) - short_s)


def _line(job: Job, alone: _Alone, machines: int, seconds: float, start: _Start) -> _Line:
    """Of runs on tars of the sample in `start.folder`, each LINE_GROWS times the one before, until
    two differ by so many seconds.

    The rate is the slope between the last two: what is in the queues at the first rows and at the
    end cancels out. How fast the
    line is, its steps alone do not say: a tiny ViT on a Ray of two busy cores made 54 images/s, the
    model alone 3,500.
    """
    images = int(
        max(
            len(alone.sample),
            machines * min(alone.slowest * seconds, LINE_GROWS * len(alone.sample)),
        )
    )
    most = max(LINE_GROWS * images, SCRATCH_BYTES / alone.kilobytes / 1000)
    first_s, before_s = _run(job, alone.sample, images, start)
    made = require_dataset(f"{start.folder}/{images}/out")
    job = job.model_copy(update={"engine": made.spec.engine})
    while True:
        images *= LINE_GROWS
        _, rows_s = _run(job, alone.sample, images, start)
        if rows_s - before_s >= seconds or images * LINE_GROWS > most:
            break
        before_s = rows_s
    rate = (images - images // LINE_GROWS) / max(1e-9, rows_s - before_s)
    return _Line(rate, first_s, _row_bytes(made), made.fragment_rows)


def _row_bytes(made: Dataset) -> float:
    """Of a row in Parquet, of the images that are different: what repeats itself costs nearly
    nothing there.
    """
    rows = read(made.out)
    rows = rows.slice(0, len(rows["content_hash"].unique()))
    return len(parquet_of(made, [rows], dict)[0]) / max(1, len(rows))


def _run(job: Job, sample: list[Encoded], images: int, start: _Start) -> tuple[float, float]:
    """Seconds from the call to the first rows, and from those to the last, of one run."""
    folder = f"{start.folder}/{images}"
    _write_tars(f"{folder}/in", sample, images)
    own = {
        "source": [f"{folder}/in"],
        "out": f"{folder}/out",
        "format": "tar",
        "image_member": None,
        "keep": [],
    }
    whole = {"limit": None, "sample": None, "since": None, "max_error_rate": 1.0}
    seen: list[tuple[float, int]] = []
    started = time.perf_counter()
    start.run(
        job.model_copy(update=own | whole),
        progress=lambda now: seen.append((time.perf_counter(), now.images)),
    )
    first = next(at for at, count in seen if count)
    last = next(at for at, count in seen if count == seen[-1][1])
    return first - started, last - first


def _write_tars(folder: str, sample: list[Encoded], images: int) -> None:
    again = itertools.islice(itertools.cycle(sample), images)
    mean = sum(len(item.data or b"") for item in sample) / len(sample)
    each = max(1, min(SHARD_IMAGES, int(SHARD_BYTES / mean)))
    for number in range(-(-images // each)):
        body = BytesIO()
        with tarfile.open(fileobj=body, mode="w") as tar:
            for at, item in enumerate(itertools.islice(again, each)):
                data = item.data or b""
                member = tarfile.TarInfo(f"{at:06d}.jpg")  # whatever it is: content decides
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
        store_for(folder).create(join(folder, f"{number:05d}.tar"), body.getvalue())
