"""Where a run spends its time: the speed of each stage alone, of all together, and the limit.

All measurements use the same images, the first ones of the job's source, encoded as they are. What
they write is removed again.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial

from vitray.cpus import cores
from vitray.dataset import RUN_RECORDS, drop_scratch, scratch, with_frozen
from vitray.decoding.decode import ON_DEVICE
from vitray.errors import count
from vitray.job import Job
from vitray.models import with_label_names
from vitray.operations.bench_pipeline import Launch, PipelineRate, measure_pipeline
from vitray.operations.bench_stages import StageRates, measure_stages
from vitray.pipeline import joined_cluster, on_machine, prepare_job, run
from vitray.storage import is_local

HERE = "on this machine"
NEAR = 0.9  # of what the stages allow: a slower pipeline loses time between them
ADVICE = {
    "read": "larger shards, a store nearby, or more machines",
    "decode": "more cores for each accelerator, decode: fast (or draft for photos of many "
    "megapixels)",
    "model": "an accelerator, precision: bf16, another engine, or a smaller model",
    "line": "time is lost between the stages. seconds_by_step in "
    f"OUT/{RUN_RECORDS} shows what waits; larger shards and fragment_rows help",
}


@dataclass(frozen=True)
class Bench:
    """What was measured. Rates are images/s.

    line: the whole pipeline; ceiling: the matrix products alone; model: with all `gpus`.
    identify_s: imports, reading the checkpoint, and timing the engines if `auto` has several;
    first_rows_s: from the call to the first staged rows. out_kilobytes: of a row, in Parquet.
    limit: read, decode or model, the slowest alone; line: what lies between the stages.
    gpus: 0 on a CPU. machines: `line` is the mean over these.
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
    identify_s: float
    out_kilobytes: float
    fragment_rows: int
    limit: str
    gpus: int = 1
    machines: int = 1
    measured: str = HERE

    def __str__(self) -> str:
        share = " (the CPU's share)" if self.decode_mode in ON_DEVICE else ""
        megabytes = self.read * self.kilobytes / 1000
        rows = [
            (
                "read",
                self.read,
                f"the first {count(self.images, 'image')} of the source, {megabytes:.0f} MB/s",
            ),
            ("decode, 1 core", self.decode_core, self.decode_mode),
            (f"decode, {count(self.cores, 'core')}", self.decode, self.decode_mode + share),
            ("model alone", self.model, self._model_note()),
            ("roofline", self.ceiling, self._ceiling_note()),
            ("whole pipeline", self.line, self._pipeline_note()),
        ]
        table = [f"{name:18}{rate:12,.1f} images/s   {note}" for name, rate, note in rows]
        if self.measured != HERE:
            table.append(f"measured {self.measured}")
        limit = "between the stages" if self.limit == "line" else self.limit
        return "\n".join([*table, f"limit: {limit}. To change that: {ADVICE[self.limit]}"])

    def _model_note(self) -> str:
        return f"{self.engine}, {self.precision}, batch {self.batch_size}, {self.device}"

    def _ceiling_note(self) -> str:
        share = self.model / self.ceiling
        return f"{self.gflops:,.0f} GFLOP/s of matrix products: the model has {share:.2f}"

    def _pipeline_note(self) -> str:
        share = self.line / self.model
        return f"{share:.2f} of the model alone; first rows after {self.first_rows_s:.1f} s"


def bench(job: Job, images: int = 256, seconds: float = 6.0, near: str = "") -> Bench:
    """The speed of each stage alone, timed for `seconds`, and of all together.

    Uses the first `images` of the source. Needs the machine for itself.

    near: if it is on S3, the whole pipeline reads and writes there, as a run would; else in the
    temporary directory. Raises JobError when the source holds no image, and what `run` raises.
    """
    stages = measure_stages(with_frozen(job), images, seconds, cores())
    frozen = stages.dataset.job.model_copy(update={"engine": stages.dataset.spec.engine})
    if near:
        drop_scratch(near)
    with (
        tempfile.TemporaryDirectory(prefix="vitray-bench-")
        if is_local(near)
        else scratch(near) as folder
    ):
        pipeline = measure_pipeline(frozen, stages, 1, seconds, Launch(folder, run))
    return _combined(stages, pipeline)


def bench_cluster(
    job: Job, address: str, images: int, seconds: float, allow_open_cluster: bool = False
) -> Bench:
    """The same for a Ray cluster: the stages on one machine, the whole pipeline on all of it.

    The pipeline runs on tars of the sample in a scratch folder of OUT, because a run writes to that
    store. They are removed afterwards, and so are those of calls that were killed.

    identify_s is the time to join Ray, and first_rows_s has the rest. Raises what `bench` and `run`
    raise; so ClusterError if not all machines see OUT.
    """
    job = with_frozen(with_label_names(prepare_job(job)))
    started = time.perf_counter()
    drop_scratch(job.out)
    with joined_cluster(address, allow_open_cluster, job.device) as machine:
        joined_s = time.perf_counter() - started
        stages: StageRates = on_machine(machine, measure_stages, job, images, seconds, machine.cpus)
        gpus = max(1, machine.gpus)
        run_there = partial(run, address=address, allow_open_cluster=allow_open_cluster)
        with scratch(job.out) as folder:
            launch = Launch(folder, run_there)
            pipeline = measure_pipeline(job, stages, machine.same_size * gpus, seconds, launch)
    per_machine = replace(pipeline, rate=pipeline.rate / machine.same_size)
    more_machines = f" and others: {machine.other_sizes}" if machine.other_sizes else ""
    return replace(
        _combined(replace(stages, identify_s=joined_s), per_machine, gpus),
        machines=machine.same_size,
        measured=f"on Ray at {address}: each stage alone on {machine.host} "
        f"(CPUs: {machine.cpus}, GPUs: {machine.gpus}), "
        f"the whole pipeline on all machines of that size: {machine.same_size}{more_machines}",
    )


def _combined(stages: StageRates, pipeline: PipelineRate, gpus: int = 1) -> Bench:
    """The figures of one machine with its GPUs, and its limit."""
    spec = stages.dataset.spec
    return Bench(
        images=len(stages.sample),
        kilobytes=stages.kilobytes,
        cores=stages.cores,
        device=stages.device,
        engine=spec.engine,
        precision=spec.precision,
        batch_size=spec.batch_size,
        decode_mode=stages.dataset.job.decode,
        read=stages.read,
        decode_core=stages.decode_core,
        decode=stages.decode,
        model=gpus * stages.model,
        ceiling=gpus * stages.roofline,
        gflops=gpus * stages.flops / 1e9,
        line=pipeline.rate,
        first_rows_s=pipeline.first_rows_s,
        identify_s=stages.identify_s,
        out_kilobytes=pipeline.row_bytes / 1000,
        fragment_rows=pipeline.fragment_rows,
        limit=_limit(stages, pipeline, gpus),
        gpus=0 if stages.device == "cpu" else gpus,
    )


def _limit(stages: StageRates, pipeline: PipelineRate, gpus: int) -> str:
    """The slowest stage; "line" if the pipeline is slower than its stages explain."""
    rates = stages.stages | {"model": gpus * stages.model}
    if pipeline.rate > stages.read:  # that is of one reader, and the pipeline has several
        del rates["read"]
    slowest = min(rates, key=lambda stage: rates[stage])
    attainable = rates[slowest]
    if stages.device == "cpu":  # decoding and the model share the cores
        attainable = min(attainable, 1 / (1 / stages.decode + 1 / stages.model))
    return slowest if pipeline.rate >= NEAR * attainable else "line"
