"""Where the time goes: images/s of each step alone, of the whole line, and which step is the limit.

All on the same images: the first ones of the job's source, encoded as they are. Nothing is written to the job's `out`.
"""

from __future__ import annotations

import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa

from vitray.dataset import Dataset
from vitray.decode import ON_DEVICE, decode
from vitray.errors import JobError
from vitray.job import Job
from vitray.models import ceiling, identify, open_model, runs_on, torch_threads_kept, vector_columns
from vitray.pipeline import run
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard

LINE_TIMES = 3  # the whole line gets so many times the seconds of a step alone, after one time that does not count
SHARD_IMAGES = 512
CALLERS = 2  # of the model at a time, as in the line: one's batches are computed while the other's last one ends
NEAR = 0.9  # of what the steps alone allow: a line slower than that loses time between them

ADVICE = {
    "read": "larger shards, a store nearby, or more machines",
    "decode": "more cores for each accelerator, decode: fast (or draft for photos of many megapixels)",
    "model": "an accelerator, precision: bf16, another engine, or a smaller model",
    "line": "seconds_by_step in OUT/_vitray/runs tells what waits; larger shards and fragment_rows help",
}


@dataclass(frozen=True)
class Bench:
    """Images/s, unless named otherwise. ceiling: of the matrix products alone; first_rows_s: from the call to the first staged rows."""

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
    identify_s: float  # imports, reading the checkpoint, and timing the engines where `auto` has several
    out_kilobytes: float  # of a row, in Parquet
    limit: str  # read, decode or model: the slowest alone; line: what lies between the steps

    def __str__(self) -> str:
        rows = [
            ("read", self.read, f"from the source, {self.read * self.kilobytes / 1000:.0f} MB/s"),
            ("decode, 1 core", self.decode_core, self.decode_mode),
            (
                f"decode, {self.cores} cores",
                self.decode,
                self.decode_mode + (" (the CPU's share)" if self.decode_mode in ON_DEVICE else ""),
            ),
            ("model alone", self.model, f"{self.engine}, {self.precision}, batch {self.batch_size}, {self.device}"),
            (
                "ceiling",
                self.ceiling,
                f"{self.gflops:,.0f} GFLOP/s of matrix products: the model has {self.model / self.ceiling:.2f}",
            ),
            (
                "whole line",
                self.line,
                f"{self.line / self.model:.2f} of the model alone; first rows after {self.first_rows_s:.1f} s",
            ),
        ]
        table = [f"{name:18}{rate:12,.1f} images/s   {note}" for name, rate, note in rows]
        return "\n".join([*table, f"limit: {self.limit}. To change that: {ADVICE[self.limit]}"])


def bench(job: Job, images: int = 256, seconds: float = 6.0) -> Bench:
    """Time every step alone, for so many seconds, and together, on the first `images` of the source. Wants the whole machine.

    Raises JobError when the source holds no image, and what `run` raises.
    """
    sample, read = _read(job, images)
    started = time.perf_counter()
    facts, device = identify(job), runs_on(job)
    identify_s = time.perf_counter() - started
    dataset = Dataset(job.out, job, facts, tuple(vector_columns(job, facts)), pa.schema([]), len(sample))
    count = len(os.sched_getaffinity(0))
    decode_core, decode_all = (_decode(dataset, sample, threads, seconds / 2) for threads in (1, count))
    before = ceiling(facts, device)  # twice, since other work on the machine comes and goes
    model = _model(dataset, device, count, seconds)
    most, flops = (sum(pair) / 2 for pair in zip(before, ceiling(facts, device)))
    alone = {"read": read, "decode": decode_all, "model": model}
    if job.decode in ON_DEVICE:  # what was timed is the CPU's share
        del alone["decode"]
    line, first, out_bytes = _line(dataset, sample, int(max(len(sample), min(alone.values()) * seconds)))
    if line > read:  # one reader alone; the line has several
        del alone["read"]
    slowest = min(alone, key=lambda step: alone[step])
    # on a CPU the cores are shared
    together = alone[slowest] if device != "cpu" else min(alone[slowest], 1 / (1 / decode_all + 1 / model))
    return Bench(
        images=len(sample),
        kilobytes=sum(len(one.data or b"") for one in sample) / len(sample) / 1000,
        cores=count,
        device=device,
        engine=facts.engine,
        precision=facts.precision,
        batch_size=facts.batch_size,
        decode_mode=job.decode,
        read=read,
        decode_core=decode_core,
        decode=decode_all,
        model=model,
        ceiling=most,
        gflops=flops / 1e9,
        line=line,
        first_rows_s=first,
        identify_s=identify_s,
        out_kilobytes=out_bytes / 1000,
        limit=slowest if line >= NEAR * together else "line",
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
        raise JobError(f"{', '.join(job.source)} holds no image to measure with. Check `source` and `format`.")
    return sample, len(sample) / (time.perf_counter() - started)


def _decode(dataset: Dataset, sample: list[Encoded], threads: int, seconds: float) -> float:
    """Each thread has a child of its own, as in the line."""
    parts = [sample[n : n + 32] for n in range(0, len(sample), 32)]
    parts *= -(-4 * threads // len(parts))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: decode(part, dataset.decode_spec), parts[:threads]))
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            done += sum(len(outcomes) for _, outcomes in pool.map(lambda part: decode(part, dataset.decode_spec), parts))
        return done / (time.perf_counter() - started)


def _model(dataset: Dataset, device: str, threads: int, seconds: float) -> float:
    """On what the line gives it at a time: four batches of synthetic pixels, from CALLERS threads.

    A slope, too: at the end of each run cores wait for the last batch.
    """
    facts, job = dataset.facts, dataset.job
    pixels = np.random.default_rng(0).integers(0, 256, (4 * facts.batch_size, *facts.pixels.shape, 3), dtype=np.uint8)
    with torch_threads_kept(), ThreadPoolExecutor(CALLERS) as pool:
        model = open_model(facts, list(dataset.vectors), job.top_k, job.labelled, device, threads, job.compile == "on")

        def seconds_of(calls: int) -> float:
            started = time.perf_counter()
            list(pool.map(lambda _: model.predict(pixels), range(calls)))
            return time.perf_counter() - started

        model.predict(pixels)
        short_s = seconds_of(CALLERS)
        more = CALLERS * max(1, round(seconds / short_s))
        return more * len(pixels) / max(1e-9, seconds_of(CALLERS + more) - short_s)


def _line(dataset: Dataset, sample: list[Encoded], images: int) -> tuple[float, float, float]:
    """Images/s, seconds until the first rows, and bytes of a row, of runs on tars of the sample in a scratch directory.

    The rate is the slope between a short run and a long one: what is in the queues at the first rows and at the end cancels out.
    """
    long = (1 + LINE_TIMES) * images
    with tempfile.TemporaryDirectory(prefix="vitray-bench-") as scratch:
        runs = [_run(dataset, sample, many, f"{scratch}/{many}") for many in (images, long)]
        written = sum(path.stat().st_size for path in Path(f"{scratch}/{long}/out/data").iterdir())
    (first, short_s), (_, long_s) = runs
    return (long - images) / max(1e-9, long_s - short_s), first, written / long


def _run(dataset: Dataset, sample: list[Encoded], images: int, folder: str) -> tuple[float, float]:
    """Seconds from the call to the first rows, and from those to the last, of one run."""
    _write_tars(f"{folder}/in", sample, images)
    own = {"source": [f"{folder}/in"], "out": f"{folder}/out", "format": "tar", "image_member": None, "keep": []}
    fixed = {"engine": dataset.facts.engine, "limit": None, "sample": None, "since": None, "max_error_rate": 1.0}
    seen: list[tuple[float, int]] = []
    started = time.perf_counter()
    run(dataset.job.model_copy(update=own | fixed), progress=lambda now: seen.append((time.perf_counter(), now.images)))
    first = next(at for at, count in seen if count)
    last = next(at for at, count in seen if count == seen[-1][1])
    return first - started, last - first


def _write_tars(folder: str, sample: list[Encoded], images: int) -> None:
    os.makedirs(folder)
    again = itertools.islice(itertools.cycle(sample), images)
    for number in range(-(-images // SHARD_IMAGES)):
        with tarfile.open(f"{folder}/{number:05d}.tar", "w") as tar:
            for at, item in enumerate(itertools.islice(again, SHARD_IMAGES)):
                data = item.data or b""
                member = tarfile.TarInfo(f"{at:06d}.jpg")  # whatever it is: content decides
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
