"""A run: list, plan, then read, decode, predict, write and commit every shard, then the manifest.

Correctness does not depend on Ray: every fragment has a fixed range and is created once, and every
commit is conditional. The workers of an executor (local_executor.py, ray_executor.py) move shards
through the stages (stages.py). What a dead process lost is computed again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from vitray.budget import Budget
from vitray.clock import utc_now
from vitray.crash import crash_point
from vitray.dataset import (
    Dataset,
    LastSource,
    Leases,
    RecordKind,
    accepted_ids,
    base_of,
    check_store,
    committed_files,
    dataset_url,
    drop_scratch,
    drop_unstarted,
    open_dataset,
    package_versions,
    read_acceptances,
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
    JobError,
    ShardError,
    VitrayError,
    shortened,
)
from vitray.exit_codes import ExitCode
from vitray.job import Job
from vitray.models import (
    TIMING_PAYS,
    check_model,
    compiles,
    resolve_device,
    torch_threads_kept,
    usable_gpus,
    vector_columns,
    with_label_names,
)
from vitray.phases import Phase
from vitray.pipeline.cluster import own_cpus, ray_session
from vitray.pipeline.driver import Executor, RunState, complete_shards
from vitray.pipeline.local_executor import LocalExecutor
from vitray.pipeline.machines import local_share
from vitray.pipeline.metrics import Meter, Meters, RayMeter
from vitray.pipeline.partition import Partition
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.ray_executor import RayExecutor
from vitray.pipeline.source_listing import (
    Gone,
    deleted_files,
    files_to_prune,
    list_source,
    passthrough_of,
    pending_shards,
    prepare_job,
    settle_groups,
    stored_passthrough,
)
from vitray.schema import ModelSpec, Shard
from vitray.sources import (
    Listing,
    absent_members,
    count_selection,
    estimate_images,
    find_key_column,
    select_shards,
)
from vitray.storage import exists, join

log = logging.getLogger(__name__)

ATTEMPTS = 3  # at inputs that change while they are read
LEAST_IMAGE_BYTES = 4096  # photos are larger: a number of bytes bounds the number of images
PLANNED_TOLERANCE = 0.1  # of the images: a run of another size is no test of the planned time


def run(
    job: Job,
    *,
    address: str | None = None,
    prune: bool | Gone = False,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    allow_open_cluster: bool = False,
    planned: dict[str, Any] | None = None,
    spec: ModelSpec | None = None,
    partition: Partition | None = None,
    budget: Budget | None = None,
    meter: Meter | None = None,
) -> Result:
    """Label and embed what is missing in `job.out`. It is safe to repeat, at any time and place.

    address: of a Ray cluster; `local` starts one for this run. prune: remove rows of deleted files;
    a Gone of find_gone(): only those.
    progress: called with the state of the run, again and again.
    stop: once it is set, the run stops reading, finishes the writes that have begun, and raises
    Interrupted.
    allow_open_cluster: join a Ray that requires no token, too.
    planned: the estimate, with at least {"images", "seconds"}; the run record compares it with the
    result.
    spec: the model, where it is known already; else it is identified.
    partition: the part of the shards that this process begins with, before it helps with others.
    budget: limits of time and cost at which the run ends early, and prices. It then reads nothing
    more, finishes and commits what it has begun, and returns; `ended_by` names the limit.
    meter: gets each fragment and commit, and the run record.

    Raises JobError (and its kinds) before any work when the job does not fit. Raises ShardError
    where `keep` needs the types of columns and no file can be read. Raises StorageError,
    CommitError or ClusterError when something is broken, ErrorRateExceeded above `max_error_rate`.
    After any of them the same call continues.
    """
    started = time.monotonic()
    state = RunState(
        started=started,
        prune=bool(prune),
        agreed=prune if isinstance(prune, Gone) else None,
        report=progress or (lambda _: None),
        stop=stop or threading.Event(),
        partition=partition or Partition(0, 1),
        budget=budget or Budget(),
        meter=meter or Meter(),
    )
    try:
        return _run(job, state, address, allow_open_cluster, planned, spec)
    except Exception as error:
        _record_early_failure(job, state, error)
        raise


def _run(
    job: Job,
    state: RunState,
    address: str | None,
    allow_open_cluster: bool,
    planned: dict[str, Any] | None,
    spec: ModelSpec | None,
) -> Result:
    state.enter(Phase.READING_SOURCE)
    job = with_label_names(prepare_job(job))
    listing = list_source(job)
    state.selection = count_selection(listing, job)
    if state.selection.is_set:
        log.warning("%s", state.selection)
    drop_scratch(job.out)
    if not exists(dataset_url(job.out)):
        check_store(job.out)
    existing = open_dataset(job.out)
    if existing is not None:
        _announce_other_source(job, existing)
        if _is_complete(job, listing, state):
            return _finish_complete(job, existing, listing, state)
    crash_point("driver-listed")
    frozen = with_frozen(job)
    images = _images_of_source(job, listing) if frozen.engine == "auto" else 0
    state.enter(Phase.OPENING_MODEL)
    with _opened_executor(job, address, allow_open_cluster) as executor:
        spec = spec or executor.identify(frozen, images, partial(state.enter, Phase.TIMING_ENGINES))
        job = _with_key_column(job, listing)
        dataset, listing = _open_or_create(job, spec, listing)
        if isinstance(executor, RayExecutor):
            state.meter = Meters([state.meter, RayMeter()])
        try:
            with _failure_recorded(dataset, state, executor):
                _label_missing(dataset, job, listing, executor, state)
        except (ErrorRateExceeded, Interrupted, ClusterError) as error:
            # Committed files may have superseded others, which readers would see twice.
            with contextlib.suppress(VitrayError):
                result = finish_run(dataset, job, state)
                record = _record(dataset, result, state, executor, planned)
                _write_record(dataset, {**record, **_failure(error)}, state)
            raise
        result = finish_run(dataset, job, state)
        record = _record(dataset, result, state, executor, planned)
        _write_record(dataset, record, state)
        crash_point("driver-recorded")
        return result


def _announce_other_source(job: Job, existing: Dataset) -> None:
    """Say that the dataset has images of another source, which stay."""
    if existing.job.source != job.source:
        log.warning(
            "%s has images of %s; this run adds those of %s. Rows of the former stay, unless "
            "--prune removes them.",
            job.out,
            ", ".join(existing.job.source),
            ", ".join(job.source),
        )


def _finish_complete(job: Job, existing: Dataset, listing: Listing, state: RunState) -> Result:
    """The result of a run with nothing to do. The model is compared, and not opened."""
    model = check_model(with_frozen(job), existing.spec, reads_weights=False)
    dataset = _resolve(job, model.spec, listing)
    record_source(dataset, _last_source(listing), always=True)
    result = finish_run(dataset, job, state)
    _write_record(dataset, _record(dataset, result, state, None, None), state)
    return result


def _images_of_source(job: Job, listing: Listing) -> int:
    """About how many images the model of a new dataset will see, in this run and in later ones."""
    images = sum(shard.size for shard in listing.shards) // LEAST_IMAGE_BYTES
    # an upper bound, which is enough where it is low
    return images if images < TIMING_PAYS else estimate_images(listing.shards, job)[0]


def _is_complete(job: Job, listing: Listing, state: RunState) -> bool:
    """Whether nothing of the source is missing in the dataset, and nothing is to be pruned.

    Files that are gone as a whole are pruned by the manifest step.
    """
    if listing.new_groups or (state.prune and files_to_prune(listing, state.agreed)):
        return False
    return not pending_shards(job, listing)


@contextlib.contextmanager
def _opened_executor(job: Job, address: str | None, allow_open: bool) -> Iterator[Executor]:
    """Workers on the cluster at the address, or on a local Ray, or in this process alone.

    It is this process when this machine has at most one GPU to use, Ray was not started before, and
    there is no address.
    """
    uses_ray = (
        address
        or os.environ.get("RAY_ADDRESS")
        or ("ray" in sys.modules and import_module("ray").is_initialized())
    )
    if not uses_ray and usable_gpus(device := resolve_device(job.device)) <= 1:
        share = local_share(own_cpus(), has_gpu=device == "cuda")
        with torch_threads_kept(), contextlib.closing(LocalExecutor(share)) as here:
            yield here
        return
    with ray_session(address, allow_open), contextlib.closing(RayExecutor(job.device)) as cluster:
        yield cluster


def _open_or_create(job: Job, spec: ModelSpec, listing: Listing) -> tuple[Dataset, Listing]:
    """The job's dataset, and the listing that fits it."""
    existed = exists(dataset_url(job.out))
    dataset = _resolve(job, spec, listing)
    if existed and dataset.is_new:  # it replaces one without rows, whose groups are gone
        listing = list_source(job)
    if spec.engine_why:
        log.info("engine: auto is %s (%s)", dataset.spec.engine, spec.engine_why)
    crash_point("driver-resolved")
    return dataset, listing


def _label_missing(
    dataset: Dataset, job: Job, listing: Listing, executor: Executor, state: RunState
) -> None:
    """Complete the shards. Inputs that change are planned again, ATTEMPTS times at most."""
    require_own_data_files(dataset)
    inputs = [listing.shards[0].url, dataset.spec.model, dataset.spec.head]
    executor.require_shared(dataset.out, inputs)
    check_store(dataset.out)
    record_source(dataset, _last_source(listing), always=True)
    with Leases(dataset.out, state.run_id) as leases:
        for _ in range(ATTEMPTS):
            if state.prune:
                state.pruned_files += len(files_to_prune(listing, state.agreed))
            listing = settle_groups(job, listing, state.prune, state.agreed)
            state.changed.clear()
            crash_point("driver-planned")
            if pending := pending_shards(job, listing):
                unmark_success(dataset.out)
                _expect(pending, state)
                state.enter(Phase.COMPUTING)
                executor.begin(dataset, pending, _compiles(job, pending, executor))
                complete_shards(dataset, pending, executor, leases, state)
            is_ended = state.is_ending and bool(pending_shards(job, listing))
            if is_ended and state.stop.is_set():
                raise Interrupted("what is staged stays. Run the same command again to continue.")
            if is_ended:
                return
            state.ended_by = None
            if not state.changed:
                return
            listing = list_source(job)


@contextlib.contextmanager
def _failure_recorded(dataset: Dataset, state: RunState, executor: Executor) -> Iterator[None]:
    """Write a record when a run fails.

    By it, a later job with other fields knows that it may replace a dataset without rows. Where not
    even the record can be written, as on a full disk, the new dataset is removed.
    """
    try:
        yield
    except (ErrorRateExceeded, Interrupted, ClusterError):  # these get a complete record
        raise
    except Exception as error:
        record = {**_work(dataset, state, executor), **_failure(error)}
        try:
            _write_record(dataset, record, state)
        except VitrayError:
            if dataset.is_new:
                with contextlib.suppress(VitrayError):
                    drop_unstarted(dataset.out)
        raise


def _record_early_failure(job: Job, state: RunState, error: Exception) -> None:
    """Write a record of a run that failed before its work, as where the source does not answer.

    Only into a dataset with rows: in one without, a record says that it may be replaced. A job that
    does not fit leaves no record. A store that denies access does, although its exit code is the
    same: rights change from night to night.
    """
    if state.is_recorded or isinstance(error, JobError):
        return
    with contextlib.suppress(VitrayError):
        dataset = open_dataset(job.out)
        if dataset is not None and committed_files(job.out):
            _write_record(dataset, {**_work(dataset, state, None), **_failure(error)}, state)


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
    passthrough = stored_passthrough(job)
    if passthrough is None:
        passthrough = passthrough_of(job, listing)
        _announce_absent_members(job, listing)
    return resolve_dataset(job, spec, vector_columns(job, spec), passthrough, utc_now())


def _announce_absent_members(job: Job, listing: Listing) -> None:
    """Say which members of `keep` the first file has not; those columns are null."""
    for shard in listing.shards:
        with contextlib.suppress(ShardError):
            if absent := absent_members(shard, job):
                log.warning(
                    "keep: no sample at the start of %s has a member .%s; null where there is none",
                    shard.url,
                    ", .".join(absent),
                )
            break


def _compiles(job: Job, pending: list[Shard], executor: Executor) -> bool:
    """Whether a worker has enough images for the time that torch.compile takes."""
    device = "cuda" if executor.share.gpus else "cpu"
    images = sum(shard.size for shard in pending) // LEAST_IMAGE_BYTES
    if compiles(job.compile, images // executor.workers, device):
        images = estimate_images(pending, job)[0]
    return compiles(job.compile, images // executor.workers, device)


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
class _SourceNow:
    """What a job's source holds, as of the last time that it was listed.

    accepted: ids that a person accepted; a shard among them is not expected to be committed.
    """

    job: Job
    listing: Listing = field(default_factory=lambda: Listing([], []))
    selected: list[Shard] = field(default_factory=list)
    accepted: set[str] = field(default_factory=set)

    def list_ids(self) -> tuple[list[str], list[str]]:
        """The ids of all shards, and of those that the job selects and that are not accepted."""
        self.listing = list_source(self.job)
        self.selected = select_shards(self.listing.shards, self.job)
        self.accepted = accepted_ids(self.job.out)
        planned = [shard.id for shard in self.selected if shard.id not in self.accepted]
        return [shard.id for shard in self.listing.shards], planned


def finish_run(dataset: Dataset, job: Job, state: RunState) -> Result:
    """The manifest step on what the source holds now, and the result of the run."""
    state.enter(Phase.FINISHING)
    source = _SourceNow(job)
    restore_dataset(dataset)  # another first run that failed may have removed it
    agreed = None if state.agreed is None else state.agreed.shards
    ledger = write_manifest(dataset, source.list_ids, state.prune, agreed, state.commits)
    listing, selected = source.listing, source.selected
    record_source(dataset, _last_source(listing))
    deleted = sum(len(deleted_files(shard)) for shard in listing.shards)
    rated = ledger.rows + ledger.errors - deleted
    state.update_usage()
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
        accepted=_accepted(dataset, source, ledger.truncated),
        notes=state.notes,
        truncated=ledger.truncated,
        reasons=dict(state.progress.reasons),
        gone=ledger.gone,
        pruned=sum(ledger.pruned.values()) + state.pruned_files,
        deleted=deleted,
        too_many_errors=ledger.errors - deleted > job.max_error_rate * rated,
        cost=state.budget.cost(state.usage),
        ended_by=state.ended_by,
    )


def _set_aside(dataset: Dataset, selected: list[Shard], state: RunState) -> dict[str, str]:
    """{shard: why} of the shards that this run could not commit.

    A shard that another run finished, that is accepted or no longer listed, is not among them.
    """
    uncommitted = {shard.id for shard in selected} - committed_files(dataset.out).keys()
    uncommitted -= accepted_ids(dataset.out)
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


def _accepted(dataset: Dataset, source: _SourceNow, truncated: Collection[str]) -> dict[str, str]:
    """{shard: what was accepted, by whom} of shards that are cut short or not committed."""
    if not source.accepted:
        return {}
    uncommitted = {shard.id for shard in source.selected} - committed_files(dataset.out).keys()
    relevant = uncommitted | set(truncated)
    return {shard: str(one) for shard, one in read_acceptances(dataset.out, relevant).items()}


def _record(
    dataset: Dataset,
    result: Result,
    state: RunState,
    executor: Executor | None,
    planned: dict[str, Any] | None,
) -> dict[str, object]:
    """The run record. Its keys are stored names."""
    record: dict[str, object] = {}
    if planned is not None:
        record["planned"] = planned
        difference = abs(result.images - planned["images"])
        if planned["seconds"] and difference <= PLANNED_TOLERANCE * planned["images"]:
            record["seconds_over_planned"] = round(result.seconds / planned["seconds"], 3)
    if result.ended_by is not None:
        record["ended"] = result.ended_by
    return {
        **record,
        **_work(dataset, state, executor),
        **asdict(result),
        "exit_code": int(result.exit_code),
    }


def _work(dataset: Dataset, state: RunState, executor: Executor | None) -> dict[str, object]:
    """What every record of a run has: which run it was, and what it computed.

    executor: None if there was nothing to compute.
    """
    progress = state.progress
    images = progress.images - progress.resumed
    seconds = time.monotonic() - state.started
    state.update_usage()
    cost = state.budget.cost(state.usage)
    return {
        "run": state.run_id,
        "kind": RecordKind.RUN,
        "started": state.started_at,
        "finished": utc_now(),
        "host": socket.gethostname(),
        "fingerprint": dataset.fingerprint,
        "versions": package_versions(),
        "shares": {"workers": executor.workers, **asdict(executor.share)} if executor else {},
        "seconds_by_step": {stage: round(spent, 3) for stage, spent in progress.seconds.items()},
        "bytes": progress.size_bytes,
        "timeline": progress.timeline,
        "images": images,
        "seconds": seconds,
        "images_per_s": round(images / max(1e-9, seconds), 2),
        "reasons": dict(progress.reasons),
        "cost": None if cost is None else asdict(cost),
    }


def _write_record(dataset: Dataset, record: dict[str, object], state: RunState) -> None:
    state.is_recorded = True
    state.meter.record(record)
    write_run_record(dataset, state.run_id, record)


def _failure(error: Exception) -> dict[str, object]:
    """The fields of a run record that say how the run failed."""
    code = error.exit_code if isinstance(error, VitrayError) else ExitCode.BROKEN_SYSTEM
    return {
        "exit_code": int(code),
        "ended": shortened(f"{type(error).__name__}: {error}", 400),
    }
