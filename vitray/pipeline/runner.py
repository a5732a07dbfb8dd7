"""A run: list, plan, then rounds of read, decode, predict, write and commit, then the manifest.

Correctness does not depend on Ray: every fragment has a fixed range and is created once, and every
commit is conditional. An executor (ray_executor.py, local_executor.py) moves batches through the
stages (stages.py). What a dead process lost is computed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any

import pyarrow as pa

from vitray.clock import utc_now
from vitray.crash import crash_point
from vitray.dataset import (
    Dataset,
    LastSource,
    base_of,
    check_store,
    committed_files,
    dataset_url,
    drop_scratch,
    drop_unstarted,
    open_dataset,
    package_versions,
    passthrough_in_data,
    record_source,
    require_own_data_files,
    resolve_dataset,
    restore_dataset,
    unmark_success,
    with_frozen,
    write_manifest,
    write_run_record,
)
from vitray.errors import (
    ClusterError,
    ErrorRateExceeded,
    Interrupted,
    ShardError,
    VitrayError,
    shortened,
)
from vitray.job import Job
from vitray.models import (
    compiles,
    identify,
    resolve_device,
    torch_threads_kept,
    vector_columns,
    with_label_names,
)
from vitray.pipeline.cluster import (
    Shares,
    alive_nodes,
    on_worker,
    own_cpus,
    ray_session,
    require_shared,
    root_error,
    share_out,
)
from vitray.pipeline.local_executor import LocalExecutor
from vitray.pipeline.metrics import RayMeter
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.ray_executor import RayExecutor
from vitray.pipeline.rounds import ATTEMPTS, Executor, MachineLostError, RunState, run_round
from vitray.pipeline.source_listing import (
    deleted_files,
    list_source,
    pending_shards,
    prepare_job,
    settle_groups,
)
from vitray.schema import ModelSpec, Shard
from vitray.sources import (
    Listing,
    absent_members,
    count_selection,
    estimate_images,
    find_key_column,
    passthrough_schema,
    select_shards,
)
from vitray.storage import exists, join

log = logging.getLogger(__name__)

# Ray keeps 12 to 37 kB of each fragment in the driver until its round ends.
ROUND_SHARDS = 4096
ROUND_FRAGMENTS = 65_536
# From the second fault on, the next round has this many times fewer shards; after a round without
# a fault, this many times more.
SHRINK_FACTOR = 8
FATAL_SHARDS = 5  # when this many shards in a row fail alone, the fault is not in the shards
LEAST_IMAGE_BYTES = 4096  # photos are larger: a number of bytes bounds the number of images
PLANNED_TOLERANCE = 0.1  # of the images: a run of another size is no test of the planned time
OpenExecutor = Callable[[Dataset, list[Shard]], Executor]


def run(
    job: Job,
    *,
    address: str | None = None,
    prune: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    allow_open_cluster: bool = False,
    planned: dict[str, Any] | None = None,
) -> Result:
    """Label and embed what is missing in `job.out`. It is safe to repeat, at any time and place.

    address: of a Ray cluster; `local` starts one for this run. prune: remove rows of deleted files.
    progress: called with the state of the run, again and again.
    stop: once it is set, the run stops reading, finishes the writes that have begun, and raises
    Interrupted.
    allow_open_cluster: join a Ray that requires no token, too.
    planned: the estimate, with at least {"images", "seconds"}; the run record compares it with the
    result.

    Raises JobError (and its kinds) before any work when the job does not fit. Raises ShardError
    where `keep` needs the types of columns and no file can be read. Raises StorageError,
    CommitError or ClusterError when something is broken, ErrorRateExceeded above `max_error_rate`.
    After any of them the same call continues.
    """
    started = time.monotonic()
    job = with_label_names(prepare_job(job))
    listing = list_source(job)
    state = RunState(
        started=started,
        prune=prune,
        report=progress or (lambda _: None),
        stop=stop or threading.Event(),
        selection=count_selection(listing, job),
    )
    if state.selection.is_set:
        log.warning("%s", state.selection)
    drop_scratch(job.out)
    if not exists(dataset_url(job.out)):
        check_store(job.out)
    if _is_complete(job, listing, prune):
        dataset = _resolve(job, identify(with_frozen(job), runs_here=False), listing)
        return finish_run(dataset, job, state)
    crash_point("driver-listed")
    with _machines(job, address, allow_open_cluster) as machines:
        spec = _identify(job, machines)
        job = _with_key_column(job, listing)
        dataset, listing = _open_or_create(job, spec, listing)
        if machines.nodes:
            state.meter = RayMeter()
        try:
            with _failure_recorded(dataset, state):
                _label_missing(dataset, job, listing, machines, state)
        except (ErrorRateExceeded, Interrupted, ClusterError) as error:
            # Committed files may have superseded others, which readers would see twice.
            with contextlib.suppress(VitrayError):
                result = finish_run(dataset, job, state)
                record = _record(dataset, result, state, machines.shares, planned)
                write_run_record(dataset, state.run_id, {**record, "ended": _ended(error)})
            raise
        result = finish_run(dataset, job, state)
        record = _record(dataset, result, state, machines.shares, planned)
        write_run_record(dataset, state.run_id, record)
        crash_point("driver-recorded")
        return result


def _is_complete(job: Job, listing: Listing, prune: bool) -> bool:
    """Whether the dataset exists and nothing of the source is missing in it."""
    if listing.new_groups or (prune and any(map(deleted_files, listing.shards))):
        return False
    return open_dataset(job.out) is not None and not pending_shards(job, listing)


@dataclass(frozen=True)
class _Machines:
    """What runs the rounds. nodes: of Ray; [] where this process does everything."""

    open_executor: Callable[..., Executor]
    shares: Shares
    nodes: list[dict[str, Any]]


@contextlib.contextmanager
def _machines(job: Job, address: str | None, allow_open: bool) -> Iterator[_Machines]:
    """The cluster at the address, or a local Ray, or this process alone.

    It is this process when the model runs on the CPU, Ray was not started before, and there is no
    address.
    """
    uses_ray = (
        address
        or os.environ.get("RAY_ADDRESS")
        or ("ray" in sys.modules and import_module("ray").is_initialized())
    )
    if not uses_ray and resolve_device(job.device) == "cpu":
        # Short queues: after a kill, the fragments in them are computed again.
        shares = replace(share_out([{"CPU": own_cpus()}], "cpu"), stagers=2, queue_blocks=1)
        with torch_threads_kept():
            yield _Machines(LocalExecutor, shares, [])
        return

    def current_shares() -> Shares:
        return share_out([node["Resources"] for node in alive_nodes()], job.device)

    def open_ray(dataset: Dataset, shards: list[Shard], shares: Shares) -> RayExecutor:
        # Machines come and go between rounds.
        return RayExecutor(dataset, shards, replace(current_shares(), compiled=shares.compiled))

    with ray_session(address, allow_open):
        yield _Machines(open_ray, current_shares(), alive_nodes())


def _identify(job: Job, machines: _Machines) -> ModelSpec:
    """The model, on the kind of machine that will run it."""
    frozen = with_frozen(job)
    if machines.nodes:
        spec: ModelSpec = on_worker(machines.shares, identify, frozen)
        return spec
    return identify(frozen)


def _open_or_create(job: Job, spec: ModelSpec, listing: Listing) -> tuple[Dataset, Listing]:
    """The job's dataset, and the listing that fits it."""
    existed = exists(dataset_url(job.out))
    dataset = _resolve(job, spec, listing)
    if existed and dataset.is_new:  # it replaces one without rows, whose groups are gone
        listing = list_source(job)
    if spec.engine_why:
        log.warning("engine: auto is %s (%s)", dataset.spec.engine, spec.engine_why)
    crash_point("driver-resolved")
    return dataset, listing


def _label_missing(
    dataset: Dataset, job: Job, listing: Listing, machines: _Machines, state: RunState
) -> None:
    """Complete the shards. Inputs that change are planned again, ATTEMPTS times at most."""
    require_own_data_files(dataset)
    inputs = [listing.shards[0].url, dataset.spec.model, dataset.spec.head]
    require_shared(dataset.out, inputs, machines.nodes)
    check_store(dataset.out)
    record_source(dataset, _last_source(listing), always=True)
    for _ in range(ATTEMPTS):
        listing = settle_groups(job, listing, state.prune)
        state.changed.clear()
        crash_point("driver-planned")
        shares = _with_compiled(job, listing, machines.shares)
        open_executor = partial(machines.open_executor, shares=shares)
        complete_shards(dataset, job, listing, open_executor, state)
        if not state.changed:
            return
        listing = list_source(job)


@contextlib.contextmanager
def _failure_recorded(dataset: Dataset, state: RunState) -> Iterator[None]:
    """Write a record when the first run of a dataset fails.

    By it, a later job with other fields knows that it may replace the dataset. Where not even the
    record can be written, as on a full disk, the new dataset is removed.
    """
    try:
        yield
    except (ErrorRateExceeded, Interrupted, ClusterError):  # these get a complete record
        raise
    except Exception as error:
        if not dataset.is_new:
            raise
        record: dict[str, object] = {
            "run": state.run_id,
            "finished": utc_now(),
            "ended": _ended(error),
        }
        try:
            write_run_record(dataset, state.run_id, record)
        except VitrayError:
            with contextlib.suppress(VitrayError):
                drop_unstarted(dataset.out)
        raise


def _last_source(listing: Listing) -> LastSource:
    return LastSource(listing.kind, listing.left_out, listing.suffixes)


def _with_key_column(job: Job, listing: Listing) -> Job:
    """The job with the key column that a new dataset takes from its Parquet files."""
    if open_dataset(job.out) is not None:
        return job
    name = find_key_column(listing.shards, job)
    if name == job.key_column:
        return job
    log.warning("keys come from column `%s` (`key_column` names another one)", name)
    return job.with_found_key(name)


def _resolve(job: Job, spec: ModelSpec, listing: Listing) -> Dataset:
    passthrough = _passthrough(job, listing)
    return resolve_dataset(job, spec, vector_columns(job, spec), passthrough, utc_now())


def _passthrough(job: Job, listing: Listing) -> pa.Schema:
    """The types of the passthrough columns: those of the dataset, else those of the first files.

    Raises ShardError when no file can be read.
    """
    existing = open_dataset(job.out)
    if existing is not None and existing.job.keep == job.keep:
        return existing.passthrough
    if existing is None:
        schema = passthrough_in_data(job.out, [job.passthrough_name(name) for name in job.keep])
        if schema is not None:  # dataset.json was lost
            return schema
    schema = passthrough_schema(listing.shards, job)
    for shard in listing.shards:
        with contextlib.suppress(ShardError):
            if absent := absent_members(shard, job):
                log.warning(
                    "keep: no sample at the start of %s has a member .%s; null where there is none",
                    shard.url,
                    ", .".join(absent),
                )
            break
    return schema


def _with_compiled(job: Job, listing: Listing, shares: Shares) -> Shares:
    """The shares, with `compiled` as it fits the first round."""
    round_shards = pending_shards(job, listing)[:ROUND_SHARDS]
    device = "cuda" if shares.actor_gpus else "cpu"
    images = sum(shard.size for shard in round_shards) // LEAST_IMAGE_BYTES
    if compiles(job.compile, images // shares.actors, device):
        images = estimate_images(round_shards, job)[0]
    return replace(shares, compiled=compiles(job.compile, images // shares.actors, device))


def complete_shards(
    dataset: Dataset, job: Job, listing: Listing, open_executor: OpenExecutor, state: RunState
) -> None:
    """Rounds until every shard is committed or set aside.

    A round that a system fault ended is planned again. Raises Interrupted, ClusterError when
    everything fails again and again, and errors of the rounds.
    """
    pending = pending_shards(job, listing)
    if pending:
        unmark_success(dataset.out)
    _expect(pending, state)
    faults = _Faults()
    while pending and not faults.are_fatal:
        if state.stop.is_set():
            raise Interrupted("what is staged stays. Run the same command again to continue.")
        round_shards = _within_memory(pending[: faults.round_size], job, dataset.fragment_rows)
        try:
            run_round(dataset, round_shards, open_executor(dataset, round_shards), state)
            faults.round_succeeded()
        except Exception as error:
            _raise_own_error(error)
            faults.round_failed(error, round_shards, state)
        if not faults.are_fatal:
            pending = _still_pending(dataset, pending, round_shards, state)
    is_still = state.progress.images == state.progress.resumed
    if faults.are_fatal or (faults.failed_alone and is_still):
        faults.raise_fatal()


def _expect(pending: list[Shard], state: RunState) -> None:
    """Set what the progress of the run is measured against.

    The progress continues where inputs that changed are planned again.
    """
    state.deleted_files = sum(len(deleted_files(shard)) for shard in pending)
    progress = state.progress
    progress.shards = progress.shards_done + len(pending)
    progress.images_expected = None
    rows = [shard.rows for shard in pending if shard.rows is not None]
    if len(rows) == len(pending):
        progress.images_expected = progress.images + sum(rows)
    progress.bytes_expected = progress.size_bytes + sum(shard.size for shard in pending)


@dataclass
class _Faults:
    """System faults of rounds, and the size of the next round.

    A fault that cannot be assigned to a shard makes the rounds smaller, until a shard is alone.
    failed_alone: shards whose rounds of one shard failed since the last good round.
    """

    round_size: int = ROUND_SHARDS
    count: int = 0
    failed_alone: set[str] = field(default_factory=set)
    last: Exception = field(default_factory=Exception)

    @property
    def are_fatal(self) -> bool:
        return len(self.failed_alone) == FATAL_SHARDS

    def round_succeeded(self) -> None:
        self.round_size = min(ROUND_SHARDS, SHRINK_FACTOR * self.round_size)
        self.failed_alone = set()

    def round_failed(self, error: Exception, shards: list[Shard], state: RunState) -> None:
        why = _last_line(error)
        log.warning("a round ended early (%s); planning again", why)
        self.last = error
        if isinstance(error, MachineLostError):  # no shard caused it
            return
        self.count += 1
        if len(shards) == 1:
            state.record_failure(shards[0].id, f"its processes died: {why}")
            self.failed_alone.add(shards[0].id)
        if self.count > 1:
            self.round_size = max(1, len(shards) // SHRINK_FACTOR)

    def raise_fatal(self) -> None:
        shards = ", ".join(sorted(self.failed_alone)[:3])
        raise ClusterError(
            f"the run fails again and again, also with {shards} alone: {_last_line(self.last)}. "
            "Look at that (and at Ray's logs, where it runs on Ray) and at that input, then run "
            "again."
        ) from self.last


def _still_pending(
    dataset: Dataset, pending: list[Shard], round_shards: list[Shard], state: RunState
) -> list[Shard]:
    """The shards to plan again after a round; those that failed come last."""
    done = committed_files(dataset.out).keys()
    for shard_id in {shard.id for shard in round_shards} & state.commits.keys() - done:
        del state.commits[shard_id]
        state.record_failure(
            shard_id,
            "a machine says it is committed, but it is not in `out`: do all machines see the same "
            "disk?",
        )
    ended = done | state.changed
    again = [
        shard
        for shard in pending
        if shard.id not in ended and state.attempts.get(shard.id, 0) < ATTEMPTS
    ]
    return sorted(again, key=lambda shard: state.attempts.get(shard.id, 0))


def _within_memory(shards: list[Shard], job: Job, fragment_rows: int) -> list[Shard]:
    """The first shards, at least one, with about ROUND_FRAGMENTS (estimated from sizes)."""
    most_rows = ROUND_FRAGMENTS * fragment_rows
    if sum(shard.rows or shard.size // LEAST_IMAGE_BYTES for shard in shards) <= most_rows:
        return shards
    sizes = list(accumulate(shard.size for shard in shards))
    images = max(1, estimate_images(shards, job)[0])
    return shards[: max(1, bisect(sizes, sizes[-1] * most_rows / images))]


def finish_run(dataset: Dataset, job: Job, state: RunState) -> Result:
    """The manifest step on what the source holds now, and the result of the run."""
    listing = Listing([], [])
    selected = list[Shard]()

    def list_ids() -> tuple[list[str], list[str]]:
        nonlocal listing, selected
        listing = list_source(job)
        selected = select_shards(listing.shards, job)
        return [shard.id for shard in listing.shards], [shard.id for shard in selected]

    restore_dataset(dataset)  # another first run that failed may have removed it
    ledger = write_manifest(dataset, list_ids, state.prune, state.commits)
    record_source(dataset, _last_source(listing))
    deleted = sum(len(deleted_files(shard)) for shard in listing.shards)
    rated = ledger.rows + ledger.errors - deleted
    return Result(
        out=dataset.out,
        errors_path=join(dataset.out, dataset.errors_folder),
        shards=ledger.shards,
        rows=ledger.rows,
        errors=ledger.errors,
        pending=ledger.pending,
        left_out=dict(Counter(listing.left_out) + Counter(ledger.left_out)),
        suffixes=listing.suffixes,
        shards_not_selected=len(listing.shards) - len(selected),
        images_not_selected=state.selection.images_left,
        committed=len(state.commits),
        adopted=sum(commit.adopted for commit in state.commits.values()),
        images=state.progress.images - state.progress.resumed,
        seconds=time.monotonic() - state.started,
        set_aside=_set_aside(dataset, selected, state),
        notes=state.notes,
        truncated=ledger.truncated,
        reasons=dict(state.progress.reasons),
        gone=ledger.gone,
        deleted=deleted,
        too_many_errors=ledger.errors - deleted > job.max_error_rate * rated,
    )


def _set_aside(dataset: Dataset, selected: list[Shard], state: RunState) -> dict[str, str]:
    """{shard: why} of the shards that this run could not commit.

    A shard that another run finished, or that is no longer listed, is not among them.
    """
    uncommitted = {shard.id for shard in selected} - committed_files(dataset.out).keys()
    changed = {base_of(shard_id) for shard_id in state.changed}
    reasons = {
        shard_id: "its input changed each time it was read"
        for shard_id in sorted(uncommitted)
        if base_of(shard_id) in changed
    }
    for shard_id, why in state.failures.items():
        if shard_id in uncommitted:
            reasons[shard_id] = why
    return reasons


def _record(
    dataset: Dataset,
    result: Result,
    state: RunState,
    shares: Shares,
    planned: dict[str, Any] | None,
) -> dict[str, object]:
    """The run record. Its keys are stored names."""
    record: dict[str, object] = {}
    if planned is not None:
        record["planned"] = planned
        difference = abs(result.images - planned["images"])
        if planned["seconds"] and difference <= PLANNED_TOLERANCE * planned["images"]:
            record["seconds_over_planned"] = round(result.seconds / planned["seconds"], 3)
    seconds = state.progress.seconds
    return {
        **record,
        "run": state.run_id,
        "finished": utc_now(),
        "host": socket.gethostname(),
        "fingerprint": dataset.fingerprint,
        "versions": package_versions(),
        "shares": asdict(shares),
        "seconds_by_step": {stage: round(spent, 3) for stage, spent in seconds.items()},
        "bytes": state.progress.size_bytes,
        "timeline": state.progress.timeline,
        "images_per_s": round(result.images / max(1e-9, result.seconds), 2),
        **asdict(result),
    }


def _ended(error: Exception) -> str:
    """The `ended` field of a run record."""
    return shortened(f"{type(error).__name__}: {error}", 400)


def _raise_own_error(error: Exception) -> None:
    """Raise the VitrayError that is the cause of an error, without the advice that Ray appends."""
    root = root_error(error)
    if root is not None:
        raise type(root)(str(root).partition("\n")[0]) from error


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
