"""What limits a run of many workers: its driver, its commits, its requests.

`python benchmarks/bench_scale.py driver|ray|commits|idle|partitions|requests|all` measures one
part, or all of them, and prints a Markdown table. No GPU and no cluster is needed:

driver      CPU and memory of the driver, by replayed events of 100 and 800 workers
ray         CPU of the driver for receiving events from actors of Ray
commits     shards of 10 images that 16 workers commit, with 25 ms for each storage request
idle        how long a worker without a shard waits for the next one
partitions  four processes with `--partition`, left alone and killed at random
requests    S3 requests for each shard, counted at a mock S3

A storage request waits in `time.sleep`, so workers wait for it as they would for S3.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import queue
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from vitray.dataset import Commit, Dataset, Leases, committed_files, resolve_dataset
from vitray.job import Job, make_job
from vitray.models.free import FreeModel, free_spec
from vitray.operations.demo import write_tar
from vitray.pipeline.driver import RunState, complete_shards
from vitray.pipeline.events import (
    Event,
    FragmentWritten,
    ShardCommitted,
    ShardEnded,
    WorkerReady,
)
from vitray.pipeline.machines import WorkerShare, local_share
from vitray.pipeline.stages import (
    EncodedFragment,
    FragmentRows,
    decode_stage,
    predict_stage,
    read_stage,
    write_stage,
)
from vitray.pipeline.worker import Worker
from vitray.schema import End, ModelSpec, Shard, ShardKind, VectorColumn
from vitray.sources import list_shards
from vitray.storage.local import LocalStore

REQUEST_S = 0.025  # of S3, where the worker is in its region
FRAGMENT_ROWS = 1024
RAM_DISK = Path("/dev/shm")  # no fsync of a disk that 16 workers would not share


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. aim: text; empty where there is none."""

    part: str
    what: str
    value: str
    aim: str = ""


def markdown(figures: Sequence[Figure]) -> str:
    lines = ["| part | figure | measured | aim |", "| --- | --- | --- | --- |"]
    lines += [f"| {each.part} | {each.what} | {each.value} | {each.aim} |" for each in figures]
    return "\n".join(lines)


# ---------------------------------------------------------------- datasets and stores


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    base = RAM_DISK if RAM_DISK.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=base) as folder:
        yield Path(folder)


def free_dataset(folder: Path, pixels: int = 224, **fields: object) -> Dataset:
    """A dataset in folder/out whose model costs nothing. pixels: the side of its images."""
    values = {
        "source": f"{folder}/in",
        "model": "free",
        "out": str(folder / "out"),
        "device": "cpu",
        "fragment_rows": FRAGMENT_ROWS,
    }
    spec = free_spec(0)
    spec = dataclasses.replace(spec, pixels=dataclasses.replace(spec.pixels, size=(pixels, pixels)))
    vector = VectorColumn("embedding", spec.dimension, None, "cls", False, "float32")
    job = make_job({**values, **fields})
    return resolve_dataset(job, spec, [vector], pa.schema([]), "2026-12-01T00:00:00+00:00")


@contextlib.contextmanager
def slow_requests(seconds: float) -> Iterator[Counter[str]]:
    """Make each request of the local store take longer. Yields how many there were, by kind.

    An `open` is a HEAD and a GET, as on S3.
    """
    counts = Counter[str]()
    names = ("find", "glob", "stat", "open", "create", "replace", "delete")
    originals = {name: getattr(LocalStore, name) for name in names}
    for name, original in originals.items():
        setattr(LocalStore, name, _delayed(name, original, seconds, counts))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(LocalStore, name, original)


def _delayed(
    name: str, original: Callable[..., Any], seconds: float, counts: Counter[str]
) -> Callable[..., Any]:
    """A method of the store that waits first, unless another of its methods calls it."""

    def call(store: LocalStore, *arguments: Any, **options: Any) -> Any:
        if getattr(_calls, "is_inside", False):
            return original(store, *arguments, **options)
        requests = 2 if name == "open" else 1
        if name == "delete":
            arguments = (list(arguments[0]),)
            requests = len(arguments[0])
        counts[name] += requests
        time.sleep(requests * seconds)
        _calls.is_inside = True
        try:
            return original(store, *arguments, **options)
        finally:
            _calls.is_inside = False

    return call


_calls = threading.local()


class SimulatedExecutor:
    """What stand-ins for an executor share: they need no model and no machine."""

    def __init__(self, share: WorkerShare, workers: int) -> None:
        self.share = share
        self.workers = workers
        self.machines = workers

    def identify(self, job: Job) -> ModelSpec:
        return free_spec(0)

    def require_shared(self, out: str, inputs: list[str]) -> None: ...

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None: ...

    def stop(self) -> None: ...

    def is_waiting_for_machine(self) -> bool:
        return False

    def describe(self) -> str:
        return "simulated"

    def close(self) -> None: ...


def complete(
    dataset: Dataset, shards: Sequence[Shard], executor: Any, state: RunState | None = None
) -> RunState:
    state = state or RunState()
    executor.begin(dataset, shards, compiled=False)
    with contextlib.closing(executor), Leases(dataset.out, state.run_id) as leases:
        complete_shards(dataset, shards, executor, leases, state)
    return state


# ---------------------------------------------------------------- driver


@dataclass(frozen=True, slots=True)
class Replay:
    """What is replayed. finished_at_once: fragments whose events arrive together."""

    fragments: int = 100_000
    shard_fragments: int = 4
    workers: int = 100
    finished_at_once: int = 1

    @property
    def shards(self) -> int:
        return self.fragments // self.shard_fragments

    @property
    def images(self) -> int:
        return self.fragments * FRAGMENT_ROWS


class ReplayExecutor(SimulatedExecutor):
    """Workers that finish a fragment whenever they are asked. cpu_s: what they spent themselves."""

    def __init__(self, replay: Replay) -> None:
        share = local_share(16, has_gpu=True)
        super().__init__(share, replay.workers)
        self.cpu_s = 0.0
        self._replay = replay
        capacity = share.capacity(FRAGMENT_ROWS)
        names = [f"worker {number}" for number in range(replay.workers)]
        self._shards = {name: deque[str]() for name in names}
        self._next = dict.fromkeys(names, 0)  # fragment of the first shard
        self._busy = deque[str]()  # workers that have a shard
        self._ready: list[Event] = [WorkerReady(name, *capacity) for name in names]

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        started = time.thread_time()
        if not self._shards[worker]:
            self._busy.append(worker)
        self._shards[worker].extend(shard.id for shard in shards)
        self.cpu_s += time.thread_time() - started

    def events(self, wait_s: float) -> list[Event]:
        started = time.thread_time()
        events, self._ready = self._ready, []
        if not events:
            for _ in range(min(self._replay.finished_at_once, len(self._busy))):
                events += self._finish_fragment(self._busy.popleft())
        self.cpu_s += time.thread_time() - started
        return events

    def _finish_fragment(self, worker: str) -> list[Event]:
        shard = self._shards[worker][0]
        number = self._next[worker]
        start = number * FRAGMENT_ROWS
        seconds = {"read": 0.5, "decode": 2.5, "predict": 0.1, "stage": 0.05}
        reasons = {} if number else {"truncated": 1}
        stop = start + FRAGMENT_ROWS
        events: list[Event] = [FragmentWritten(shard, start, stop, reasons, seconds, 110_000_000)]
        self._next[worker] = number + 1
        if number + 1 == self._replay.shard_fragments:
            self._next[worker] = 0
            self._shards[worker].popleft()
            commit = Commit(
                shard, stop - 1, 1, reasons={"truncated": 1}, truncated_at=None, adopted=False
            )
            events += [ShardEnded(shard, End(stop)), ShardCommitted(shard, commit)]
        if self._shards[worker]:
            self._busy.append(worker)
        return events


def replay_shards(count: int) -> list[Shard]:
    """Shards as a listing of S3 gives them."""
    return [
        Shard(
            f"train-{number:06d}-{number:012x}-{number % 4294967296:08x}",
            ShardKind.TAR,
            f"s3://a-bucket/collection/train-{number:06d}.tar",
            440_000_000,
            f"{number:032x}-52",
            modified=1.7e9 + number,
        )
        for number in range(count)
    ]


def create_empty_data_files(dataset: Dataset, shards: Sequence[Shard]) -> None:
    """The driver looks whether committed shards are in `out`."""
    for shard in shards:
        path = Path(dataset.data_url(shard.id))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@dataclass(frozen=True, slots=True)
class DriverCost:
    """What a replay took. cpu_s: of everything but the stand-in for workers."""

    replay: Replay
    cpu_s: float

    @property
    def fragment_ms(self) -> float:
        return 1000 * self.cpu_s / self.replay.fragments

    @property
    def shard_ms(self) -> float:
        return 1000 * self.cpu_s / self.replay.shards


def driver_cost(folder: Path, replay: Replay) -> DriverCost:
    """Replay events through `complete_shards`. Raises RuntimeError where a shard is missing."""
    dataset = free_dataset(folder)
    shards = replay_shards(replay.shards)
    create_empty_data_files(dataset, shards)
    executor = ReplayExecutor(replay)
    started = time.process_time()
    state = complete(dataset, shards, executor)
    cpu_s = time.process_time() - started - executor.cpu_s
    if state.progress.images != replay.images or len(state.commits) != replay.shards:
        raise RuntimeError(f"{len(state.commits)} of {replay.shards} shards were committed")
    return DriverCost(replay, cpu_s)


@dataclass(frozen=True, slots=True)
class DriverMemory:
    """Bytes that Python objects take: the shards, and what the run adds at its end and peak."""

    shards: int
    state: int
    peak: int


def driver_memory(folder: Path, replay: Replay) -> DriverMemory:
    dataset = free_dataset(folder)
    create_empty_data_files(dataset, replay_shards(replay.shards))
    gc.collect()
    tracemalloc.start()
    shards = replay_shards(replay.shards)
    listed, _ = tracemalloc.get_traced_memory()
    state = complete(dataset, shards, ReplayExecutor(replay))
    state.progress.recent.clear()  # points of the last ten seconds, which the replay did not take
    gc.collect()
    ended, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(state.commits) == replay.shards
    return DriverMemory(listed, ended - listed, peak - listed)


def measure_driver() -> list[Figure]:
    replays = {
        "100 workers, shards of 4 fragments, one fragment at a time": Replay(),
        "the same, 100 fragments at a time": Replay(finished_at_once=100),
        "100 workers, shards of 1 fragment": Replay(shard_fragments=1),
        "800 workers, shards of 4 fragments": Replay(workers=800),
        "800 workers, 100 fragments at a time": Replay(workers=800, finished_at_once=100),
    }
    figures = list[Figure]()
    for what, replay in replays.items():
        with scratch_folder() as folder:
            cost = driver_cost(folder, replay)
        value = f"{cost.fragment_ms:.3f} ms, {cost.shard_ms:.3f} ms"
        figures.append(Figure("driver", f"CPU per fragment, per shard: {what}", value, "10 ms"))
    replay = Replay(fragments=20_000)
    with scratch_folder() as folder:
        memory = driver_memory(folder, replay)
    per_million = 1e6 / replay.images / 1000
    for what, size in dataclasses.asdict(memory).items():
        title = f"memory per million images in shards of 4,096: {what}"
        each = f"{size / replay.shards:.0f} bytes per shard"
        figures.append(Figure("driver", title, f"{size * per_million:.0f} kB ({each})"))
    return figures


# ---------------------------------------------------------------- ray

RAY_ACTORS = 8
RAY_ANSWERS = 4000


class AnsweringActor:
    """An actor of Ray that answers like a worker: with the events of one fragment, after a wait."""

    def __init__(self) -> None:
        shard = replay_shards(1)[0].id
        seconds = {"read": 0.5, "decode": 2.5, "predict": 0.1, "stage": 0.05}
        self._events = [FragmentWritten(shard, 0, FRAGMENT_ROWS, {}, seconds, 110_000_000)]

    def events(self, wait_s: float) -> list[Event]:
        time.sleep(wait_s)
        return list(self._events)


def ray_answer_ms(workers: int) -> float:
    """CPU ms of the driver for each answer, while it waits for so many of them.

    The calls are those of RayExecutor.events. A few actors stand for all workers.
    """
    import ray

    streams = workers // RAY_ACTORS
    kind = ray.remote(AnsweringActor).options(num_cpus=0, max_concurrency=streams)
    actors = [kind.remote() for _ in range(RAY_ACTORS)]
    ray.get([actor.events.remote(0) for actor in actors])
    wait_s = workers / 1000  # a thousand answers per second
    answers = {actor.events.remote(wait_s): actor for actor in actors for _ in range(streams)}
    started = time.process_time()
    taken_answers = 0
    while taken_answers < RAY_ANSWERS:
        ready, waiting = ray.wait(list(answers), num_returns=1, timeout=1.0)
        if ready and waiting:
            ready += ray.wait(waiting, num_returns=len(waiting), timeout=0)[0]
        for answer in ready:
            actor = answers.pop(answer)
            assert len(ray.get(answer)) == 1
            answers[actor.events.remote(wait_s)] = actor
        taken_answers += len(ready)
    return 1000 * (time.process_time() - started) / taken_answers


def measure_ray() -> list[Figure]:
    import ray

    figures = list[Figure]()
    for workers in (8, 100, 800):
        ray.init(
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        )
        value = f"{ray_answer_ms(workers):.2f} ms"
        ray.shutdown()
        what = f"CPU of Ray's client in the driver per answer of a worker, {workers} workers"
        figures.append(Figure("ray", what, value))
    return figures


# ---------------------------------------------------------------- commits

SMALL_SHARD = 10
SMALL_SHARDS = 1000
SMALL_PIXELS = 32
WORKERS = 16


class ManyWorkers(SimulatedExecutor):
    """Real workers, all in this process: they share one core for Python, as they would not."""

    def __init__(self, share: WorkerShare, workers: int) -> None:
        super().__init__(share, workers)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._workers: dict[str, Worker] = {}
        self._is_closed = threading.Event()

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        for number in range(self.workers):
            name = f"worker {number}"
            worker = Worker(name, dataset, self.share)
            self._workers[name] = worker
            worker.start()
            threading.Thread(target=self._forward, args=(worker,), daemon=True).start()

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        self._workers[worker].give(shards)

    def events(self, wait_s: float) -> list[Event]:
        return taken(self._events, wait_s)

    def close(self) -> None:
        self._is_closed.set()
        for worker in self._workers.values():
            worker.close()

    def _forward(self, worker: Worker) -> None:
        while not self._is_closed.is_set():
            for event in worker.events(0.5):
                self._events.put(event)


def taken(events: queue.SimpleQueue[Event], wait_s: float) -> list[Event]:
    """All events that wait; waits for the first one."""
    waiting = list[Event]()
    with contextlib.suppress(queue.Empty):
        waiting.append(events.get(timeout=wait_s))
        while True:
            waiting.append(events.get_nowait())
    return waiting


def write_small_tars(folder: Path, count: int) -> None:
    """Tars of SMALL_SHARD tiny JPEGs, all with the same bytes."""
    from PIL import Image

    members = list[tuple[str, bytes]]()
    for number in range(SMALL_SHARD):
        buffer = io.BytesIO()
        side = (SMALL_PIXELS, SMALL_PIXELS)
        Image.new("RGB", side, (20 * number, 80, 160)).save(buffer, "JPEG")
        members.append((f"{number:04d}.jpg", buffer.getvalue()))
    folder.mkdir(parents=True)
    write_tar(str(folder.parent / "ready.tar"), members)
    data = (folder.parent / "ready.tar").read_bytes()
    for number in range(count):
        (folder / f"{number:05d}.tar").write_bytes(data)


@dataclass(frozen=True, slots=True)
class CommitRate:
    """Shards that were committed. seconds: from the first commit to the last one."""

    shards: int
    seconds: float
    cpu_s: float
    requests: float

    @property
    def shards_per_s(self) -> float:
        return self.shards / self.seconds


@dataclass
class CommitTimes:
    """The progress of a run of so many shards, as times of commits."""

    total: int
    first: float = 0.0
    last: float = 0.0
    first_count: int = 0
    count: int = 0
    cpu_s: float = 0.0

    def report(self, progress: Any) -> None:
        if progress.shards_done == self.count:
            return
        self.count = progress.shards_done
        self.last = time.monotonic()
        if not self.first:
            self.first, self.first_count = self.last, self.count
            self.cpu_s = -cpu_s_of_all()
        elif self.count == self.total:
            self.cpu_s += cpu_s_of_all()


def cpu_s_of_all() -> float:
    """CPU seconds of this process and of its decoders."""
    import psutil

    own = psutil.Process()
    times = [each.cpu_times() for each in (own, *own.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def small_commits(folder: Path, shards: int, workers: int, fragment_rows: int) -> CommitRate:
    """Real workers read, decode, label and commit small tars."""
    write_small_tars(folder / "in", shards)
    dataset = free_dataset(folder, SMALL_PIXELS, fragment_rows=fragment_rows)
    planned = list_shards(dataset.job, []).shards
    share = dataclasses.replace(local_share(4, has_gpu=False), decoders=1, queue_blocks=4)
    times = CommitTimes(shards)
    state = RunState(report=times.report)
    with slow_requests(REQUEST_S) as counts:
        complete(dataset, planned, ManyWorkers(share, workers), state)
    if len(committed_files(dataset.out)) != shards:
        raise RuntimeError("not all shards were committed")
    done = shards - times.first_count
    return CommitRate(done, times.last - times.first, times.cpu_s, sum(counts.values()) / shards)


def ready_fragments(dataset: Dataset, shards: Sequence[Shard]) -> list[FragmentRows]:
    """The last stage's input, for shards of one fragment each."""
    model = FreeModel(dataset.spec, dataset.outputs)
    rows = list[FragmentRows]()
    for shard in shards:
        read = [item for item in read_stage(dataset, shard) if isinstance(item, EncodedFragment)]
        rows += predict_stage(dataset, model, decode_stage(dataset, read))
    return rows


def commits_alone(folder: Path, shards: int, threads: int) -> CommitRate:
    """Threads that do nothing but the last stage."""
    write_small_tars(folder / "in", shards)
    dataset = free_dataset(folder, SMALL_PIXELS, fragment_rows=SMALL_SHARD)
    fragments = ready_fragments(dataset, list_shards(dataset.job, []).shards)
    started, cpu_s = time.monotonic(), time.process_time()
    with slow_requests(REQUEST_S) as counts, ThreadPoolExecutor(threads) as pool:
        outcomes = list(pool.map(partial(write_stage, dataset), fragments))
    assert all(isinstance(events[-1], ShardCommitted) for events in outcomes)
    seconds = time.monotonic() - started
    return CommitRate(shards, seconds, time.process_time() - cpu_s, sum(counts.values()) / shards)


def measure_commits() -> list[Figure]:
    figures = list[Figure]()
    shards_of = f"shards of {SMALL_SHARD} images"
    cases = {"one fragment each": SMALL_SHARD, "2 fragments each": SMALL_SHARD // 2}
    for what, fragment_rows in cases.items():
        with scratch_folder() as folder:
            rate = small_commits(folder, SMALL_SHARDS, WORKERS, fragment_rows)
        figures.append(commit_figure(f"{shards_of}, {what}, {WORKERS} workers", rate))
    threads = WORKERS * local_share(2, has_gpu=False).writers
    with scratch_folder() as folder:
        rate = commits_alone(folder, SMALL_SHARDS, threads)
    figures.append(commit_figure(f"{shards_of}, commits alone by the same {threads} writers", rate))
    return figures


def commit_figure(what: str, rate: CommitRate) -> Figure:
    cpu = f"{1000 * rate.cpu_s / rate.shards:.1f} ms of CPU"
    value = f"{rate.shards_per_s:.0f} shards/s ({rate.requests:.1f} requests, {cpu} per shard)"
    return Figure("commits", what, value, "60 shards/s")


# ---------------------------------------------------------------- idle

IDLE_SHARDS = 600
IDLE_SHARD_S = 0.25


class IdleWorkers(SimulatedExecutor):
    """Threads that sleep for each shard. waits: of workers that had finished all of theirs."""

    def __init__(self, workers: int, at_once: int, shard_s: float) -> None:
        super().__init__(local_share(2, has_gpu=False), workers)
        self.waits = list[float]()
        self._at_once = at_once
        self._shard_s = shard_s
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        names = [f"worker {number}" for number in range(workers)]
        self._given = {name: queue.SimpleQueue[Shard | None]() for name in names}

    def begin(self, dataset: Dataset, shards: Sequence[Shard], compiled: bool) -> None:
        os.makedirs(f"{dataset.out}/data")
        for name in self._given:
            threading.Thread(target=self._work, args=(name, dataset), daemon=True).start()
            self._events.put(WorkerReady(name, self._at_once, self._at_once * FRAGMENT_ROWS))

    def give(self, worker: str, shards: Sequence[Shard]) -> None:
        for shard in shards:
            self._given[worker].put(shard)

    def events(self, wait_s: float) -> list[Event]:
        return taken(self._events, wait_s)

    def close(self) -> None:
        for given in self._given.values():
            given.put(None)

    def _work(self, name: str, dataset: Dataset) -> None:
        finished_at: float | None = None
        while (shard := self._given[name].get()) is not None:
            if finished_at is not None:
                self.waits.append(time.monotonic() - finished_at)
            time.sleep(self._shard_s * random.uniform(0.5, 1.5))
            finished_at = time.monotonic()
            Path(dataset.data_url(shard.id)).touch()
            commit = Commit(shard.id, FRAGMENT_ROWS, 0, {}, truncated_at=None, adopted=False)
            self._events.put(FragmentWritten(shard.id, 0, FRAGMENT_ROWS))
            self._events.put(ShardEnded(shard.id, End(FRAGMENT_ROWS)))
            self._events.put(ShardCommitted(shard.id, commit))


def idle_waits(folder: Path, at_once: int, beside_another: bool) -> list[float]:
    """Seconds that workers waited. at_once: shards that a worker has.

    beside_another: another run holds a lease, so that claims take more requests.
    """
    dataset = free_dataset(folder)
    executor = IdleWorkers(WORKERS, at_once, IDLE_SHARD_S)
    with slow_requests(REQUEST_S), contextlib.ExitStack() as stack:
        if beside_another:
            stack.enter_context(Leases(dataset.out, "0-another"))
        complete(dataset, replay_shards(IDLE_SHARDS), executor)
    return executor.waits


def measure_idle() -> list[Figure]:
    figures = list[Figure]()
    for at_once, beside_another in ((1, False), (3, False), (3, True)):
        with scratch_folder() as folder:
            waits = idle_waits(folder, at_once, beside_another)
        what = f"{WORKERS} workers with {at_once} shards at once, {len(waits)} waits"
        if beside_another:
            what += ", beside another run"
        value = f"median {statistics.median(waits):.3f} s, longest {max(waits):.3f} s"
        figures.append(Figure("idle", what, value, "0.5 s"))
    return figures


# ---------------------------------------------------------------- partitions

PARTITIONS = 4
PART_IMAGES = 1000
PART_TARS = 40
PART_PIXELS = (1200, 900)  # about 15 ms of decoding, so that all processes work at the same time
PART_FRAGMENT = 8
PROCESS_TIMEOUT_S = 240
KILLED_RUNS = 3
CHECKPOINT = Path(__file__).resolve().parent.parent / "tests" / "data" / "dataset-v1" / "model"


def write_photo_tars(folder: Path, images: int, tars: int) -> None:
    """Tars of photographs, whose keys are numbers."""

    from bench_memory import photographs

    photos = photographs()
    encoded = list[bytes]()
    for photo in photos:
        buffer = io.BytesIO()
        photo.resize(PART_PIXELS).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    folder.mkdir(parents=True)
    size = images // tars
    for start in range(0, images, size):
        members = [(f"{n:06d}.jpg", encoded[n % len(encoded)]) for n in range(start, start + size)]
        write_tar(str(folder / f"{start:06d}.tar"), members)


@dataclass(frozen=True, slots=True)
class Part:
    """A process `vitray run --partition index/PARTITIONS`."""

    index: int
    process: subprocess.Popen[str]


def start_part(folder: Path, index: int) -> Part:
    trace = folder / "trace"
    trace.mkdir(exist_ok=True)
    environment = {**os.environ, "VITRAY_TRACE": str(trace), "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    fields = ["device=cpu", "engine=torch", "batch_size=8", f"fragment_rows={PART_FRAGMENT}"]
    sets = [part for name in fields for part in ("--set", name)]
    argv = [sys.executable, "-m", "vitray", "run", str(folder / "in"), "--model", str(CHECKPOINT)]
    argv += ["--out", str(folder / "out"), "--partition", f"{index}/{PARTITIONS}", *sets]
    process = subprocess.Popen(
        argv,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"part-{index}.log").open("a"),
        start_new_session=True,  # decoders of its own end with it
    )
    return Part(index, process)


def images_by_stage(folder: Path) -> Counter[str]:
    """Images that left each stage, of all processes; those of a killed one, too."""
    counts = Counter[str]()
    for path in (folder / "trace").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a kill cut the last line short
                record = json.loads(line)
                counts[record["step"]] += record["stop"] - record["start"]
    return counts


def wait_for_images(folder: Path, images: int) -> None:
    deadline = time.monotonic() + PROCESS_TIMEOUT_S
    while images_by_stage(folder)["predict"] < images and time.monotonic() < deadline:
        time.sleep(0.02)


def kill_at_random(folder: Path, parts: list[Part], rng: random.Random) -> None:
    """kill -9 of one process in the middle of the work, and its start anew."""
    wait_for_images(folder, rng.randrange(PART_IMAGES // 5, PART_IMAGES * 4 // 5))
    victim = rng.choice([part for part in parts if part.process.poll() is None])
    os.killpg(victim.process.pid, signal.SIGKILL)
    victim.process.wait()
    parts[parts.index(victim)] = start_part(folder, victim.index)


@dataclass(frozen=True, slots=True)
class PartitionedRun:
    """How a run of several processes ended. computed: images that left the model."""

    computed: int
    lost: int
    doubled: int
    seconds: float
    is_marked: bool


def partitioned_run(folder: Path, kill: random.Random | None = None) -> PartitionedRun:
    """Run PARTITIONS processes, and kill one of them where `kill` is set.

    Raises RuntimeError for a process that fails.
    """
    started = time.monotonic()
    parts = [start_part(folder, index) for index in range(PARTITIONS)]
    try:
        if kill is not None:
            kill_at_random(folder, parts, kill)
        for part in parts:
            if part.process.wait(PROCESS_TIMEOUT_S):
                log = (folder / f"part-{part.index}.log").read_text()
                raise RuntimeError(f"process {part.index} failed: {log[-2000:]}")
    finally:
        for part in parts:
            if part.process.poll() is None:
                os.killpg(part.process.pid, signal.SIGKILL)
    seconds = time.monotonic() - started
    keys = keys_of(folder / "out")
    return PartitionedRun(
        computed=images_by_stage(folder)["predict"],
        lost=PART_IMAGES - len(keys),
        doubled=sum(keys.values()) - len(keys),
        seconds=seconds,
        is_marked=(folder / "out" / "_SUCCESS.json").exists(),
    )


def keys_of(out: Path) -> Counter[str]:
    """How often each key has a row."""
    import pyarrow.parquet as pq

    counts = Counter[str]()
    for path in (out / "data").iterdir():
        counts.update(pq.read_table(path, columns=["key"])["key"].to_pylist())
    return counts


def measure_partitions() -> list[Figure]:
    with scratch_folder() as folder:
        write_photo_tars(folder / "in", PART_IMAGES, PART_TARS)
        figures = [_partition_figure(folder, "left alone", None)]
        for seed in range(KILLED_RUNS):
            rng = random.Random(seed)
            figures.append(_partition_figure(folder, f"one killed, run {seed}", rng))
    return figures


def _partition_figure(folder: Path, what: str, kill: random.Random | None) -> Figure:
    for name in ("out", "trace"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run = partitioned_run(folder, kill)
    value = (
        f"{run.computed / PART_IMAGES:.3f} ({run.computed - PART_IMAGES} again, {run.lost} lost, "
        f"{run.doubled} doubled, {run.seconds:.0f} s)"
    )
    if not run.is_marked:
        value += ", no _SUCCESS.json"
    title = f"{PARTITIONS} processes, images computed / images, {what}"
    return Figure("partitions", title, value, "1.02" if kill is None else "0 lost, 0 doubled")


# ---------------------------------------------------------------- requests


REQUEST_FRAGMENT = 64  # of `fragment_rows: auto` on a CPU
REQUEST_KINDS = {
    "PutObject": "PUT",
    "GetObject": "GET",
    "HeadObject": "HEAD",
    "HeadBucket": "HEAD of the bucket",
    "ListObjectsV2": "LIST",
    "DeleteObject": "DELETE",
}


def requests_per_shard(images: int) -> dict[str, float]:
    """By kind, from runs of 2 and of 8 shards of so many images, in fragments of 64."""
    import bench_growth
    from bench_memory import jpegs

    with scratch_folder() as folder:
        members = [(f"{n:05d}.jpg", data) for n, data in enumerate(jpegs(images))]
        write_tar(str(folder / "ready.tar"), members)
        ready = (folder / "ready.tar").read_bytes()
    few, many = (bench_growth.requests(str(CHECKPOINT), count, ready) for count in (2, 8))
    operations = sorted(few.keys() | many.keys())
    return {REQUEST_KINDS.get(name, name): (many[name] - few[name]) / 6 for name in operations}


def measure_requests() -> list[Figure]:
    figures = list[Figure]()
    for images in (REQUEST_FRAGMENT, 2 * REQUEST_FRAGMENT, 4 * REQUEST_FRAGMENT):
        counts = requests_per_shard(images)
        value = ", ".join(f"{count:.1f} {kind}" for kind, count in counts.items() if count)
        what = f"S3 requests of a shard of {images // REQUEST_FRAGMENT} fragments"
        figures.append(Figure("requests", what, value))
    return figures


# ---------------------------------------------------------------- the command

PARTS: dict[str, Callable[[], list[Figure]]] = {
    "driver": measure_driver,
    "ray": measure_ray,
    "commits": measure_commits,
    "idle": measure_idle,
    "partitions": measure_partitions,
    "requests": measure_requests,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=[*PARTS, "all"])
    part = parser.parse_args().part
    figures = list[Figure]()
    for name in PARTS if part == "all" else [part]:
        figures += PARTS[name]()
        print(f"{name} is done", file=sys.stderr, flush=True)
    print(markdown(figures))


if __name__ == "__main__":
    main()
