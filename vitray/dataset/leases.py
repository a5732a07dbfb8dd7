"""Leases: overlapping runs of one job tell each other which shards they work on.

Each run keeps one small object, _vitray/leases/<run-id>.json: the shards that it has in flight, a
counter, and which process it is. It writes the object again when the shards change, and every
RENEW_S seconds. No clocks are compared. A run judges the lease of another one by its own clock:

- A lease whose content did not change for EXPIRE_S seconds has expired.
- A lease of a process of this machine that has ended has expired at once.

A claim first writes the ids into the run's own lease, then reads the leases of others. It keeps an
id only if no other live lease names it at that time. Of two runs that claim an id at once, each
sees the other; then the one with the smaller id waits a moment for the other to give way.

Correctness never depends on leases. A lost or damaged one costs double work, and the conditional
creates of commits make that harmless.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from vitray.dataset.files import under
from vitray.dataset.layout import leases_url
from vitray.errors import ObjectMissing, StorageError
from vitray.storage import ABANDONED_S, read, store_for

log = logging.getLogger(__name__)

RENEW_S = 3.0
EXPIRE_S = 12.0  # four renewals
LOOK_S = 1.0  # the age up to which a view of other leases is used again
CLAIM_ATTEMPTS = 4  # of one claim, where others take what it chose
# how long the smaller of two runs that claim an id at once waits: the other one gives way after
# reading the leases and writing its own, about 0.1 s at 25 ms per request
TIE_POLLS = 5
TIE_POLL_S = 0.1
READ_THREADS = 16
MAX_READS = 64  # leases read in one look: a claim takes no longer beside a thousand runs
MAX_PID = 1 << 22  # of Linux
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that has a lease, as far as a process beside it can check whether it exists.

    started: in clock ticks since the machine's start, which tells processes with one id apart.
    """

    boot_id: str
    pid_namespace: int
    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The content of a lease. holder: None where it is unknown."""

    shards: frozenset[str] = frozenset()
    holder: Holder | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """What one run saw of another run's lease.

    changed_at: when it first saw this content, by its own clock.
    """

    version: str
    data: bytes
    lease: Lease
    changed_at: float


class Conflicts(NamedTuple):
    """Claimed ids that other live leases name, too.

    lost: a smaller run names them. contested: only larger runs do, which may give way.
    """

    lost: frozenset[str]
    contested: frozenset[str]


def is_live(observation: Observation, moment: float, holder_ended: bool = False) -> bool:
    """Whether a lease counts. holder_ended: as has_ended() finds it."""
    return not holder_ended and moment - observation.changed_at < EXPIRE_S


def is_due(observation: Observation | None, version: str, moment: float) -> bool:
    """Whether a lease has to be read: it is new or changed, or would expire.

    The last look is at the object itself, since a listing of NFS may be old.
    """
    if observation is None or observation.version != version:
        return True
    return moment - observation.changed_at >= EXPIRE_S


def observe(
    previous: Observation | None, version: str, data: bytes | None, moment: float
) -> Observation | None:
    """The observation of a lease with that version. data: None where it was not read."""
    if data is None:
        if previous is None or previous.version == version:
            return previous
        # it lives; its old version stays, so that it is read later
        return replace(previous, changed_at=moment)
    if previous is not None and previous.data == data:
        return replace(previous, version=version)
    return Observation(version, data, parse_lease(data), moment)


def expires_unless_read(observation: Observation | None, version: str, moment: float) -> bool:
    """Whether a lease has shown no change for so long that only a read can save it."""
    if observation is None or observation.version != version:
        return False
    return not is_live(observation, moment)


def choose_reads(due: Mapping[str, bool], most: int) -> list[str]:
    """Up to `most` of the runs whose leases have to be read.

    due: by run, whether its lease expires unless it is read. Those come first; the others by
    chance, so that each gets its turn.
    """
    expiring = [run for run, expires in due.items() if expires][:most]
    others = [run for run, expires in due.items() if not expires]
    return expiring + random.sample(others, min(len(others), most - len(expiring)))


def free(
    candidates: Iterable[str], own: Collection[str], taken: Collection[str], most: int
) -> list[str]:
    """Up to `most` candidates that no lease names, in their order."""
    unnamed = (shard for shard in candidates if shard not in own and shard not in taken)
    return list(islice(unnamed, most))


def conflicts(run: str, claimed: Collection[str], leases: Mapping[str, Lease]) -> Conflicts:
    """The claimed ids that live leases of other runs name. leases: of other runs, by run id."""
    smaller, larger = set[str](), set[str]()
    for other, lease in leases.items():
        (smaller if other < run else larger).update(lease.shards.intersection(claimed))
    return Conflicts(frozenset(smaller), frozenset(larger - smaller))


def lease_bytes(lease: Lease, counter: int) -> bytes:
    """A lease as stored. counter: makes the content of each renewal different."""
    document = {
        "counter": counter,
        "holder": None if lease.holder is None else asdict(lease.holder),
        "shards": sorted(lease.shards),
    }
    return json.dumps(document).encode()


def parse_lease(data: bytes) -> Lease:
    """A stored lease. A damaged one names no shard, and has no known holder."""
    try:
        document = json.loads(data)
        shards, holder = document["shards"], document["holder"]
        if not isinstance(shards, list) or not all(isinstance(shard, str) for shard in shards):
            return Lease()
        return Lease(frozenset(shards), None if holder is None else _holder_of(holder))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Lease()


def _holder_of(values: Mapping[str, object]) -> Holder | None:
    """A stored holder; None where a value cannot be one."""
    boot_id = values["boot_id"]
    numbers = [values[name] for name in ("pid_namespace", "pid", "started")]
    namespace, pid, started = (number if type(number) is int else -1 for number in numbers)
    is_possible = isinstance(boot_id, str) and 0 < pid <= MAX_PID
    return Holder(str(boot_id), namespace, pid, started) if is_possible else None


def this_process() -> Holder | None:
    """This process as the holder of a lease; None where the system does not say enough."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        _, started = _process_state(os.getpid())
    except (OSError, ValueError, IndexError):
        return None
    return Holder(boot_id, namespace, os.getpid(), started)


def has_ended(holder: Holder | None, own: Holder | None) -> bool:
    """Whether a holder is a process of this machine that does not exist any more."""
    if holder is None or own is None:
        return False
    if (holder.boot_id, holder.pid_namespace) != (own.boot_id, own.pid_namespace):
        return False
    try:
        os.kill(holder.pid, 0)
        state, started = _process_state(holder.pid)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, IndexError):  # of another user, whose processes may be hidden
        return False
    return state in "ZX" or started != holder.started


def _process_state(pid: int) -> tuple[str, int]:
    """The state letter of a process and its start time in clock ticks, as in proc_pid_stat(5)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return fields[0], int(fields[19])


class Leases:
    """The lease of one run, and its view of the others. A context manager.

    run_id: unique; its order decides ties. clock, sleep: of this process, in seconds.
    Methods may be called by several threads. None of them raises a StorageError: where the store
    fails, the run works as if it was alone.
    """

    def __init__(
        self,
        out: str,
        run_id: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        renew_s: float = RENEW_S,
    ) -> None:
        self._out = out
        self._run = run_id
        self._clock = clock
        self._sleep = sleep
        self._renew_s = renew_s
        self._holder = this_process()
        self._shards = set[str]()
        self._counter = 0
        self._observed = dict[str, Observation]()
        self._looked_at = float("-inf")
        self._has_warned = False
        self._closed = threading.Event()
        # a thread takes them in this order
        self._viewing = threading.RLock()  # for _observed and _looked_at
        self._writing = threading.Lock()  # one write at a time, so that the newest one stays
        self._changing = threading.Lock()  # for _shards and _counter; never held during a request
        self._renewal = threading.Thread(
            target=self._renew_until_closed, name="vitray-lease", daemon=True
        )

    def __enter__(self) -> Self:
        self.renew()
        with self._viewing:
            self._look()  # also a run that has nothing to claim deletes leases of killed ones
        self._renewal.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def claim(self, candidates: Collection[str], most: int) -> list[str]:
        """Up to `most` shard ids, in the given order, that no other live run has.

        They are in this run's lease until they are released. Ids that it has already are left out.
        An empty list: others have all candidates, or claimed them at this moment; try again later.
        """
        with self._viewing:
            self._look_if_old()
            for _ in range(CLAIM_ATTEMPTS):
                with self._changing:
                    chosen = free(candidates, self._shards, self._named(), most)
                    self._shards.update(chosen)
                if not chosen:
                    return []
                self.renew()
                if kept := self._settle(chosen):
                    return kept
        return []

    def release(self, ids: Iterable[str]) -> None:
        """End the claim of these shards. The next claim or renewal writes it."""
        with self._changing:
            self._shards.difference_update(ids)

    def held_by_others(self) -> frozenset[str]:
        """The shard ids that live runs have, except this one; at most LOOK_S seconds old."""
        with self._viewing:
            self._look_if_old()
            return self._named()

    @property
    def has_others(self) -> bool:
        """Whether another run is live; at most LOOK_S seconds old."""
        with self._viewing:
            self._look_if_old()
            return bool(self._observed)

    def renew(self) -> None:
        """Write this run's lease, with the shards that it has now."""
        with self._writing:
            if self._closed.is_set():
                return
            with self._changing:
                self._counter += 1
                lease = Lease(frozenset(self._shards), self._holder)
                data = lease_bytes(lease, self._counter)
            try:
                store_for(self._out).replace(self._url(self._run), data)
            except StorageError as error:
                self._warn(error)

    def close(self) -> None:
        """Delete this run's lease and stop renewing it."""
        if self._closed.is_set():
            return
        self._closed.set()
        # A renewal that began before would write the lease again. One that waits for the store for
        # longer does not hold us up; its lease expires.
        is_alone = self._writing.acquire(timeout=RENEW_S)
        try:
            store_for(self._out).delete([self._url(self._run)])
            store_for(self._out).delete_folder(leases_url(self._out))
        except StorageError as error:
            self._warn(error)
        finally:
            if is_alone:
                self._writing.release()
        if is_alone and self._renewal.is_alive():
            self._renewal.join(timeout=RENEW_S)

    def _url(self, run: str) -> str:
        return leases_url(self._out, f"{run}{_SUFFIX}")

    def _renew_until_closed(self) -> None:
        while not self._closed.wait(self._renew_s):
            self.renew()

    def _settle(self, claimed: Sequence[str]) -> list[str]:
        """The claimed ids that this run keeps, after a look at the leases of others."""
        kept = list(claimed)
        for poll in range(TIE_POLLS + 1):
            if poll:
                self._sleep(TIE_POLL_S)
            self._look()
            lost, contested = conflicts(self._run, kept, self._others())
            # nothing to wait for while there is other work
            is_decided = len(contested) < len(kept) - len(lost) or poll == TIE_POLLS
            given_up = lost | contested if is_decided else lost
            if given_up:
                self.release(given_up)
                self.renew()  # at once: another run may wait for it
                kept = [shard for shard in kept if shard not in given_up]
            if is_decided or not kept:
                return kept
        raise AssertionError

    def _others(self) -> dict[str, Lease]:
        return {run: seen.lease for run, seen in self._observed.items()}

    def _named(self) -> frozenset[str]:
        return frozenset[str]().union(*(seen.lease.shards for seen in self._observed.values()))

    def _look_if_old(self) -> None:
        if self._clock() - self._looked_at >= LOOK_S:
            self._look()

    def _look(self) -> None:
        """Bring the view of other leases up to date, and delete those that have expired."""
        try:
            versions = self._list_versions()
        except StorageError as error:
            self._warn(error)
            versions = {run: seen.version for run, seen in self._observed.items()}
        moment = self._clock()
        due = {
            run: expires_unless_read(self._seen(run), version, moment)
            for run, version in versions.items()
            if is_due(self._seen(run), version, moment)
        }
        chosen = choose_reads(due, MAX_READS)
        postponed = due.keys() - set(chosen)
        contents = self._read(chosen)
        observed = {
            run: seen
            for run, version in versions.items()
            if (seen := observe(self._seen(run), version, contents.get(run), moment)) is not None
        }
        ended = {
            run for run, seen in observed.items() if has_ended(seen.lease.holder, self._holder)
        }
        self._observed = {
            run: seen
            for run, seen in observed.items()
            if run not in ended and (run in postponed or is_live(seen, moment))
        }
        self._looked_at = moment
        # One that could not be read counts no longer, but its run may live.
        self._delete((observed.keys() - self._observed.keys()) & (contents.keys() | ended))

    def _seen(self, run: str) -> Observation | None:
        return self._observed.get(run)

    def _list_versions(self) -> dict[str, str]:
        """The version of every other run's lease, by run id."""
        versions = dict[str, str]()
        for info in under(leases_url(self._out)):
            name = info.url.rsplit("/", 1)[-1]
            if name.endswith(_SUFFIX) and (run := name.removesuffix(_SUFFIX)) != self._run:
                versions[run] = info.version
        return versions

    def _read(self, runs: Sequence[str]) -> dict[str, bytes]:
        """The content of leases that can be read, by run id."""
        if len(runs) < 2:
            contents = [self._read_one(run) for run in runs]
        else:
            with ThreadPoolExecutor(min(READ_THREADS, len(runs))) as pool:
                contents = list(pool.map(self._read_one, runs))
        return {run: data for run, data in zip(runs, contents) if data is not None}

    def _read_one(self, run: str) -> bytes | None:
        try:
            return read(self._url(run))
        except ObjectMissing:  # its run has ended
            return None
        except StorageError as error:
            self._warn(error)
            return None

    def _delete(self, runs: Iterable[str]) -> None:
        """Delete expired leases. A holder that lives after all writes its lease again."""
        with contextlib.suppress(StorageError):
            store_for(self._out).delete(self._url(run) for run in sorted(runs))

    def _warn(self, error: StorageError) -> None:
        """Log the first failure of the store; the run goes on without leases."""
        if not self._has_warned:
            self._has_warned = True
            log.warning("leases do not work, so runs at the same time may repeat work: %s", error)


def has_live_run(out: str, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether a run works in a directory now. Waits EXPIRE_S where there is a lease."""
    view = Leases(out, "")  # it is not entered, so it has no lease of its own
    if not view.has_others:
        return False
    sleep(EXPIRE_S)  # until then, that of a killed run looks like any other
    return view.has_others


def drop_abandoned_leases(out: str) -> list[str]:
    """Delete the leases of killed runs, unchanged for an hour or more; returns their URLs."""
    oldest = time.time() - ABANDONED_S
    infos = under(leases_url(out))
    abandoned = [info.url for info in infos if (info.modified or 0.0) < oldest]
    store_for(out).delete(abandoned)
    return abandoned
