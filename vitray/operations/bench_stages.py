"""The speed of each stage of a pipeline by itself, on one machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vitray.dataset import Dataset
from vitray.decoding.decode import ON_DEVICE, decode
from vitray.errors import JobError, count
from vitray.job import Job
from vitray.models import identify, open_model, resolve_device, torch_threads_kept, vector_columns
from vitray.models.machine import roofline
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard

DECODE_ROWS = 32  # of one call of the decoder
# callers of the model at a time, as in a run: one's batches are computed while another's last ends
CALLERS = 2


@dataclass(frozen=True, slots=True)
class StageRates:
    """What one machine reaches in each stage by itself, in images/s, with one GPU at most.

    roofline: of the matrix products alone; flops: FLOP/s of these. identify_s: seconds until the
    model was identified.
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
    roofline: float
    flops: float

    @property
    def kilobytes(self) -> float:
        """Mean size of an encoded image."""
        return mean_kilobytes(self.sample)

    @property
    def stages(self) -> dict[str, float]:
        """The stages that can limit a run, without decoding if the GPU shares it."""
        rates = {"read": self.read, "decode": self.decode, "model": self.model}
        if self.dataset.job.decode in ON_DEVICE:  # `decode` is the CPU's share alone
            del rates["decode"]
        return rates

    @property
    def slowest(self) -> float:
        return min(self.stages.values())


def measure_stages(job: Job, images: int, seconds: float, cores: int) -> StageRates:
    """The rates of this machine, each measured for `seconds` on the first images.

    Raises JobError if the source has no image that can be decoded.
    """
    sample, read_rate = read_sample(job, images)
    started = time.perf_counter()
    spec = identify(job)
    device = resolve_device(job.device)
    identify_s = time.perf_counter() - started
    vectors = tuple(vector_columns(job, spec))
    dataset = Dataset(job.out, job, spec, vectors, pa.schema([]), len(sample))
    _require_decodable(dataset, sample)
    decode_core = _decode_rate(dataset, sample, 1, seconds / 2)
    decode_all = _decode_rate(dataset, sample, cores, seconds / 2)
    # before and after the model, since other work on the machine comes and goes
    first_images, first_flops = roofline(spec, device)
    model_rate = _model_rate(dataset, device, cores, seconds)
    last_images, last_flops = roofline(spec, device)
    return StageRates(
        dataset=dataset,
        sample=sample,
        device=device,
        cores=cores,
        identify_s=identify_s,
        read=read_rate,
        decode_core=decode_core,
        decode=decode_all,
        model=model_rate,
        roofline=(first_images + last_images) / 2,
        flops=(first_flops + last_flops) / 2,
    )


def read_sample(job: Job, images: int) -> tuple[list[Encoded], float]:
    """The first images of the source, and images/s of reading them with one reader."""
    started = time.perf_counter()
    sample = list(itertools.islice(_encoded(job), images))
    if not sample:
        raise JobError(
            f"{', '.join(job.source)} holds no image to measure with. Check `source` and `format`."
        )
    return sample, len(sample) / (time.perf_counter() - started)


def mean_kilobytes(sample: Sequence[Encoded]) -> float:
    """Mean size of the encoded images, of which there is at least one."""
    return sum(len(image.data or b"") for image in sample) / len(sample) / 1000


def _encoded(job: Job) -> Iterator[Encoded]:
    for shard in list_shards(job, []).shards:
        for item in read_shard(shard, job, lambda _: True):
            if isinstance(item, Encoded) and item.data:
                yield item


def _decode_parts(sample: list[Encoded]) -> list[list[Encoded]]:
    return [sample[start : start + DECODE_ROWS] for start in range(0, len(sample), DECODE_ROWS)]


def _require_decodable(dataset: Dataset, sample: list[Encoded]) -> None:
    for part in _decode_parts(sample):
        pixels, _ = decode(part, dataset.decode_spec)
        if len(pixels):
            return
    reason = decode(sample[:1], dataset.decode_spec)[1][0].reason
    raise JobError(
        f"none of the first {count(len(sample), 'image')} can be decoded ({reason}). "
        "Check `source` and the job."
    )


def _decode_rate(dataset: Dataset, sample: list[Encoded], threads: int, seconds: float) -> float:
    """Images/s of `threads` threads. Each has its own decoder process, as in a run."""
    parts = _decode_parts(sample)
    parts *= -(-4 * threads // len(parts))

    def decoded(part: list[Encoded]) -> int:
        return len(decode(part, dataset.decode_spec)[1])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(decoded, parts[:threads]))  # starts the processes
        images = 0
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            images += sum(pool.map(decoded, parts))
        return images / (time.perf_counter() - started)


def _model_rate(dataset: Dataset, device: str, threads: int, seconds: float) -> float:
    """Images/s of the model, on what a run gives it: four batches a call, from CALLERS threads.

    The pixels are random. The rate is the slope between a short and a long measurement: at the end
    of each one, cores wait for the last batch.
    """
    spec, job = dataset.spec, dataset.job
    shape = (4 * spec.batch_size, *spec.pixels.shape, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch_threads_kept(), ThreadPoolExecutor(CALLERS) as pool:
        model = open_model(spec, dataset.outputs, device, threads, compiled=job.compile == "on")

        def seconds_of(calls: int) -> float:
            started = time.perf_counter()
            list(pool.map(lambda _: model.predict(pixels), range(calls)))
            return time.perf_counter() - started

        model.predict(pixels)
        short_s = seconds_of(CALLERS)
        more_calls = CALLERS * max(1, round(seconds / short_s))
        return more_calls * len(pixels) / max(1e-9, seconds_of(CALLERS + more_calls) - short_s)
