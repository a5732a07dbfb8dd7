"""The straight line: list, plan, read, decode, predict, stage, commit, manifest.

Correctness does not depend on Ray: every fragment has a fixed range and is created once, every
commit is conditional. Ray (line.py) brings batches (steps.py) from step to step and tries again
what a dead process held.
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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any

import pyarrow as pa

from vitray.crash import crash_point
from vitray.dataset import (
    NO_GROUP,
    Dataset,
    LastSource,
    append_group_log,
    base_of,
    check_data,
    check_store,
    committed,
    dataset_url,
    drop_scratch,
    drop_unstarted,
    finish,
    open_dataset,
    package_versions,
    passthrough_in_data,
    remember_source,
    resolve_dataset,
    restore_dataset,
    unmark_success,
    with_frozen,
    write_run_record,
)
from vitray.errors import (
    ClusterError,
    ErrorRateExceeded,
    Interrupted,
    ShardError,
    StorageError,
    VitrayError,
    shortened,
)
from vitray.job import Job
from vitray.models import (
    compiles,
    identify,
    runs_on,
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
    share_out,
)
from vitray.pipeline.local_executor import LocalExecutor
from vitray.pipeline.metrics import Meter, RayMeter
from vitray.pipeline.progress import Progress, Result
from vitray.pipeline.ray_executor import RayExecutor
from vitray.pipeline.rounds import ATTEMPTS, Executor, MachineLostError, Work, blame, run_round
from vitray.pipeline.source_listing import list_source, prepared
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
from vitray.storage import absolute, exists, join

log = logging.getLogger(__name__)

ROUND_SHARDS, ROUND_FRAGMENTS = (
    4096,
    65_536,
)  # Ray keeps 12 to 37 kB of each fragment in the driver until its round ends
# from the second fault on, the next round has so many times fewer shards; after a good one so many
# times more
NARROWER = 8
DEADLY = 5  # so many shards that die alone, one after the other: it is not the shards
LEAST_IMAGE_BYTES = 4096  # no photo is smaller: fewer bytes than that times images need no estimate
NEARLY = (
    0.1  # of the images: a run that did a part of them says nothing of the time that was planned
)
MakeLine = Callable[[Dataset, list[Shard]], Executor]


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
    """Label and embed what is missing in `job.out`; safe to repeat, at any time, from anywhere.

    allow_open_cluster: join a Ray that asks for no token, too.
    planned: what was expected of it, at least {"images", "seconds"}; the run record holds it
    against what came.
    stop: once it is set, no more images are taken, writes that have begun are ended, and
    Interrupted is raised.

    Raises JobError (and its kinds) before any work when the job does not fit, ShardError where
    `keep` needs the types of columns and no file can be read, StorageError, CommitError or
    ClusterError when something is broken, ErrorRateExceeded above `max_error_rate`. After any of
    them the same call goes on.
    """
    started = time.monotonic()
    job = with_label_names(prepared(job))
    listing = list_source(job)
    selection = count_selection(listing, job)
    if selection.is_set:
        log.warning("%s", selection)
    drop_scratch(job.out)
    if not exists(dataset_url(job.out)):
        check_store(job.out)
    settled = not listing.new_groups and not (prune and any(map(_vanished, listing.shards)))
    if settled and open_dataset(job.out) is not None and not _pending(job, listing):
        dataset = _resolve(job, identify(with_frozen(job), runs_here=False), listing)
        return _finished(dataset, job, prune, Work(selection=selection), started)
    crash_point("driver-listed")
    with _machines(job, address, allow_open_cluster) as (open_executor, shares, nodes):
        frozen = with_frozen(job)
        spec: ModelSpec = on_worker(shares, identify, frozen) if nodes else identify(frozen)
        job = _with_key_column(job, listing)
        has_begun = exists(dataset_url(job.out))
        dataset = _resolve(job, spec, listing)
        if has_begun and dataset.is_new:  # in place of one without rows, whose groups are gone
            listing = list_source(job)
        if spec.engine_why:
            log.warning("engine: auto is %s (%s)", dataset.spec.engine, spec.engine_why)
        crash_point("driver-resolved")
        meter = RayMeter() if nodes else Meter()
        work = Work(
            report=progress or (lambda _: None),
            stop=stop or threading.Event(),
            meter=meter,
            selection=selection,
        )
        try:
            with _told_if_it_fails(dataset, work) if dataset.is_new else contextlib.nullcontext():
                check_data(dataset)
                require_shared(
                    dataset.out,
                    [listing.shards[0].url, dataset.spec.model, dataset.spec.head],
                    nodes,
                )
                check_store(dataset.out)
                remember_source(dataset, _seen(listing), begins=True)
                for _ in range(ATTEMPTS):
                    listing = _settle_groups(job, listing, prune)
                    work.changed.clear()
                    crash_point("driver-planned")
                    _complete(
                        dataset,
                        job,
                        listing,
                        partial(open_executor, shares=_compiling(job, listing, shares)),
                        work,
                    )
                    if not work.changed:
                        break
                    listing = list_source(job)
        except (ErrorRateExceeded, Interrupted, ClusterError) as error:
            with contextlib.suppress(
                VitrayError
            ):  # what was committed may have superseded files that readers see twice now
                result = _finished(dataset, job, prune, work, started)
                record = _record(dataset, result, work, shares, planned) | {
                    "ended": shortened(f"{type(error).__name__}: {error}", 400)
                }
                write_run_record(dataset, work.run_id, record)
            raise
        result = _finished(dataset, job, prune, work, started)
        write_run_record(dataset, work.run_id, _record(dataset, result, work, shares, planned))
        crash_point("driver-recorded")
        return result


@contextlib.contextmanager
def _machines(
    job: Job, address: str | None, allow_open: bool
) -> Iterator[tuple[Callable[..., Executor], Shares, list[dict[str, Any]]]]:
    """What makes a line, its shares, and Ray's nodes: none where this process does it all.

    That is where nobody asked for Ray, by an address (`local` for one of our own) or by having
    started it, and the model runs on the CPU.
    """
    asked = (
        address
        or os.environ.get("RAY_ADDRESS")
        or ("ray" in sys.modules and import_module("ray").is_initialized())
    )
    if not asked and runs_on(job) == "cpu":
        with torch_threads_kept():
            # few wait: what does is computed again after a kill
            yield (
                LocalExecutor,
                replace(share_out([{"CPU": own_cpus()}], "cpu"), stagers=2, queue_blocks=1),
                [],
            )
        return

    def now() -> Shares:
        return share_out([node["Resources"] for node in alive_nodes()], job.device)

    def open_ray(dataset: Dataset, shards: list[Shard], shares: Shares) -> RayExecutor:
        return RayExecutor(
            dataset, shards, replace(now(), compiled=shares.compiled)
        )  # machines come and go between rounds

    with ray_session(address, allow_open):
        yield open_ray, now(), alive_nodes()


@contextlib.contextmanager
def _told_if_it_fails(dataset: Dataset, work: Work) -> Iterator[None]:
    """A first run that fails leaves a record, by which a job with other fields knows that it may
    begin anew.

    Where not even that can be written, such as on a full disk, nothing is left.
    """
    try:
        yield
    except (ErrorRateExceeded, Interrupted, ClusterError):  # these leave a whole record
        raise
    except Exception as error:
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        record: dict[str, object] = {
            "run": work.run_id,
            "finished": finished,
            "ended": shortened(f"{type(error).__name__}: {error}", 400),
        }
        try:
            write_run_record(dataset, work.run_id, record)
        except VitrayError:
            with contextlib.suppress(VitrayError):
                drop_unstarted(dataset.out)
        raise


def _seen(listing: Listing) -> LastSource:
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


def _settle_groups(job: Job, listing: Listing, prune: bool) -> Listing:
    """A listing whose groups are all in the log: ours, or those of a run that was faster. prune:
    what is gone leaves its group.
    """
    for _ in range(20):
        gone = [(NO_GROUP, url) for shard in listing.shards for url in _vanished(shard) if prune]
        members = gone or [
            (group.number, url) for group in listing.new_groups for url in group.urls
        ]
        # not listed again after that: files that arrive meanwhile would become groups of one or two
        if not members or (append_group_log(absolute(job.out), members) and not gone):
            return listing
        listing = list_source(job)
    raise StorageError(
        f"{job.out}: other runs keep appending groups. Wait for them, then run the same command "
        f"again."
    )


def _pending(job: Job, listing: Listing) -> list[Shard]:
    done = committed(absolute(job.out))
    return [shard for shard in select_shards(listing.shards, job) if shard.id not in done]


def _resolve(job: Job, spec: ModelSpec, listing: Listing) -> Dataset:
    return resolve_dataset(
        job,
        spec,
        vector_columns(job, spec),
        _passthrough(job, listing),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _passthrough(job: Job, listing: Listing) -> pa.Schema:
    """The types of the passthrough columns: those of the dataset, else those that hold the values
    of the first files.

    Raises ShardError when no file can be read.
    """
    if (existing := open_dataset(job.out)) is not None and existing.job.keep == job.keep:
        return existing.passthrough
    if (
        existing is None
        and (schema := passthrough_in_data(job.out, list(map(job.passthrough_name, job.keep))))
        is not None
    ):
        return schema  # dataset.json was lost
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


def _compiling(job: Job, listing: Listing, shares: Shares) -> Shares:
    """The shares, with `compiled` as the first round of what is pending has it."""
    round_shards, device = (
        _pending(job, listing)[:ROUND_SHARDS],
        "cuda" if shares.actor_gpus else "cpu",
    )
    images = sum(shard.size for shard in round_shards) // LEAST_IMAGE_BYTES
    if compiles(job, images // shares.actors, device):
        images = estimate_images(round_shards, job)[0]
    return replace(shares, compiled=compiles(job, images // shares.actors, device))


def _complete(
    dataset: Dataset, job: Job, listing: Listing, open_executor: MakeLine, work: Work
) -> None:
    """Rounds until nothing is pending but what was set aside. A round that a system fault ended is
    planned again.
    """
    pending = _pending(job, listing)
    if pending:
        unmark_success(dataset.out)
    work.vanished = sum(len(_vanished(shard)) for shard in pending)
    known = [shard.rows for shard in pending]
    progress = work.progress  # which goes on where inputs that changed are planned again
    progress.shards = progress.shards_done + len(pending)
    progress.images_expected = (
        progress.images + sum(r for r in known if r is not None) if None not in known else None
    )
    progress.bytes_expected = progress.size_bytes + sum(shard.size for shard in pending)
    faults, size, dead, last = 0, ROUND_SHARDS, set[str](), Exception()
    while pending:
        if work.stop.is_set():
            raise Interrupted("what is staged stays. Run the same command again to go on.")
        round_shards = _within_memory(pending[:size], job, dataset.fragment_rows)
        try:
            run_round(dataset, round_shards, open_executor(dataset, round_shards), work)
            size, dead = min(ROUND_SHARDS, NARROWER * size), set()
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, VitrayError):
                raise type(cause)(
                    str(cause).partition("\n")[0]
                ) from error  # Ray appends advice of its own
            log.warning("a round ended early (%s); planning again", _last_line(error))
            last = error
            is_blamable = not isinstance(error, MachineLostError)
            faults += is_blamable
            if len(round_shards) == 1 and is_blamable:
                blame(work, round_shards[0].id, f"its processes died: {_last_line(error)}")
                dead.add(round_shards[0].id)
            if (
                faults > 1 and is_blamable
            ):  # a death nobody can be blamed for: in ever smaller rounds, until one shard is alone
                size = max(1, len(round_shards) // NARROWER)
            if len(dead) == DEADLY:
                break
        done = committed(dataset.out).keys()
        for shard_id in {shard.id for shard in round_shards} & work.commits.keys() - done:
            del work.commits[shard_id]
            blame(
                work,
                shard_id,
                "a machine says it is committed, but it is not in `out`: do all machines see the "
                "same disk?",
            )
        pending = [
            s
            for s in pending
            if s.id not in done | work.changed and work.attempts.get(s.id, 0) < ATTEMPTS
        ]
        pending.sort(
            key=lambda shard: work.attempts.get(shard.id, 0)
        )  # what has died before comes last
    is_still = work.progress.images == work.progress.resumed
    if len(dead) == DEADLY or (dead and is_still):  # all that were left died, and no image moved
        alone = ", ".join(sorted(dead)[:3])
        raise ClusterError(
            f"the line fails again and again, also with {alone} alone: {_last_line(last)}. Look "
            f"at that (and at Ray's logs, where it "
            "runs on Ray) and at that input, then run again."
        ) from last


def _within_memory(shards: list[Shard], job: Job, fragment_rows: int) -> list[Shard]:
    """The first of them, one at least: as many as have ROUND_FRAGMENTS, as far as their sizes
    tell.
    """
    most = ROUND_FRAGMENTS * fragment_rows
    if sum(shard.rows or shard.size // LEAST_IMAGE_BYTES for shard in shards) <= most:
        return shards
    stops = list(accumulate(shard.size for shard in shards))
    return shards[
        : max(1, bisect(stops, stops[-1] * most / max(1, estimate_images(shards, job)[0])))
    ]


def _finished(dataset: Dataset, job: Job, prune: bool, work: Work, started: float) -> Result:
    """The manifest step, on what the source holds now, and what the run comes to."""
    listing, selected = Listing([], []), list[Shard]()

    def list_ids() -> tuple[list[str], list[str]]:
        nonlocal listing, selected
        listing = list_source(job)
        selected = select_shards(listing.shards, job)
        return [shard.id for shard in listing.shards], [shard.id for shard in selected]

    restore_dataset(dataset)  # another first run that failed may have taken it away
    ledger = finish(dataset, list_ids, prune, work.commits)
    remember_source(dataset, _seen(listing))
    planned, vanished = (
        [shard.id for shard in selected],
        sum(len(_vanished(shard)) for shard in listing.shards),
    )
    left = (
        set(planned) - committed(dataset.out).keys()
    )  # what another run finished, or what is listed no more, is no failure
    restless = {base_of(shard) for shard in work.changed}
    aside = {
        s: "its input changed each time it was read" for s in sorted(left) if base_of(s) in restless
    }
    aside |= {s: why for s, why in work.failures.items() if s in left}
    images = work.progress.images - work.progress.resumed
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
        images_not_selected=work.selection.images_left,
        committed=len(work.commits),
        adopted=sum(commit.adopted for commit in work.commits.values()),
        images=images,
        seconds=time.monotonic() - started,
        set_aside=aside,
        notes=work.notes,
        truncated=ledger.truncated,
        reasons=dict(work.progress.reasons),
        gone=ledger.gone,
        deleted=vanished,
        too_many_errors=ledger.errors - vanished
        > job.max_error_rate * (ledger.rows + ledger.errors - vanished),
    )


def _vanished(shard: Shard) -> list[str]:
    """Files of a group that are listed no more. Each is an error row, until it is pruned; nothing
    is bad in it.
    """
    return [member.url for member in shard.members if member.size < 0 and not member.version]


def _record(
    dataset: Dataset, result: Result, work: Work, shares: Shares, planned: dict[str, Any] | None
) -> dict[str, object]:
    against: dict[str, object] = {} if planned is None else {"planned": planned}
    if (
        planned is not None
        and planned["seconds"]
        and abs(result.images - planned["images"]) <= NEARLY * planned["images"]
    ):
        against["seconds_over_planned"] = round(result.seconds / planned["seconds"], 3)
    return {
        **against,
        "run": work.run_id,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "fingerprint": dataset.fingerprint,
        "versions": package_versions(),
        "shares": asdict(shares),
        "seconds_by_step": {
            step: round(seconds, 3) for step, seconds in work.progress.seconds.items()
        },
        "bytes": work.progress.size_bytes,
        "timeline": work.progress.timeline,
        "images_per_s": round(result.images / max(1e-9, result.seconds), 2),
        **asdict(result),
    }


def _cause(error: BaseException) -> BaseException:
    """The exception of ours at the root of what Ray raised, else the one given."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(
            seen, "cause", None
        )  # first: Ray's own is a VitrayError too, but with a traceback as its text
        if isinstance(seen, VitrayError) and not isinstance(inner, BaseException):
            return seen
        seen = inner if isinstance(inner, BaseException) else seen.__cause__
    return error


def _last_line(error: BaseException) -> str:
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[
        -1
    ][:200]
