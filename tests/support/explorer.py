"""Every interleaving, within bounds, of runs that work on one store: which steps they take in turn,
and which of them go wrong.

Runs are threads of real code; each stops before every call of the store until the explorer lets it
go on, so that one execution is one list of choices. A state is what the store holds and what each
run was answered: two orders that lead to the same state are followed once. An execution is repeated
from its start for every branch, so all code under test must be deterministic.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from vitray.errors import ObjectChanged, ObjectMissing, StorageError
from vitray.storage import ObjectInfo

# what may befall a call: nothing; the process dies before or after it; the request or the answer is
# lost and nobody tries again; the answer is lost and the second try finds its own work
WELL, DIES_BEFORE, DIES_AFTER, REQUEST_LOST, ANSWER_LOST, ANSWER_LOST_THEN_REFUSED = range(6)
FAULTS_OF_READS = (DIES_BEFORE, REQUEST_LOST)
FAULTS_OF_WRITES = (DIES_BEFORE, DIES_AFTER, REQUEST_LOST, ANSWER_LOST)
FAULTS_OF_CREATES = (*FAULTS_OF_WRITES, ANSWER_LOST_THEN_REFUSED)
PATIENCE_S = 30

Choice = tuple[int, int]  # which run goes on, and what befalls its call


class Died(BaseException):
    """kill -9: no handler of the code under test may take it for an error."""


class Violation(AssertionError):
    """A promise was broken; the message holds the choices that lead there."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far to look: preemptions are switches away from a run that could have gone on."""

    preemptions: int
    faults: int
    states: int


@dataclass
class Found:
    states: int = 0
    executions: int = 0
    ends: int = 0
    complete: bool = True  # within the bounds; False when the limit of states came first


@dataclass
class Run:
    """met: what befell which calls. result or error: how it ended."""

    thread: threading.Thread
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    what: str = ""  # the call it waits to make
    faults: tuple[int, ...] = ()  # that may befall it
    fault: int = WELL
    met: list[tuple[int, str]] = field(default_factory=list)
    history: Any = field(default_factory=hashlib.sha256)
    beside: int = 0  # answers to threads that it started, in any order
    is_dead: bool = False
    is_over: bool = False
    result: Any = None
    error: BaseException | None = None


class MemoryStore:
    """Objects in memory behind the calls of vitray.storage.Store; `watch(url, before, after)` names
    the promise a change breaks.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.watch: Callable[[str, bytes | None, bytes | None], str] = lambda *_: ""
        self.broken = ""
        self.turn: Callable[[str, tuple[int, ...]], int] = lambda *_: WELL
        self.answer: Callable[[object], None] = lambda _: None

    def _call(self, what: str, faults: tuple[int, ...], work: Callable[[], Any]) -> Any:
        fault = self.turn(what, faults)
        if fault == DIES_BEFORE:
            raise Died
        if fault == REQUEST_LOST:
            self.answer("lost")
            raise StorageError("no answer")
        try:
            result = work()
        except ObjectMissing:
            self.answer("missing")
            raise
        if fault == DIES_AFTER:
            raise Died
        if fault == ANSWER_LOST:
            self.answer("lost")
            raise StorageError("no answer")
        if fault == ANSWER_LOST_THEN_REFUSED:
            result = False
        self.answer(result)
        return result

    def _info(self, url: str) -> ObjectInfo:
        if url not in self.objects:
            raise ObjectMissing(f"{url} does not exist")
        return ObjectInfo(url, len(self.objects[url]), hashlib.md5(self.objects[url]).hexdigest())

    def _set(self, url: str, data: bytes | None) -> None:
        self.broken = self.broken or self.watch(url, self.objects.get(url), data)
        if data is None:
            self.objects.pop(url, None)
        else:
            self.objects[url] = data

    def _create(self, url: str, data: bytes) -> bool:
        if url in self.objects:
            return False
        self._set(url, data)
        return True

    def find(self, prefix: str) -> list[ObjectInfo]:
        def work() -> list[ObjectInfo]:
            return [
                self._info(url)
                for url in sorted(self.objects)
                if f"{url}/".startswith(f"{prefix}/")
            ]

        found: list[ObjectInfo] = self._call(f"find {prefix}", FAULTS_OF_READS, work)
        return found

    def find_few(self, prefix: str) -> list[ObjectInfo]:
        return self.find(prefix)

    def stat(self, url: str) -> ObjectInfo:
        info: ObjectInfo = self._call(f"stat {url}", FAULTS_OF_READS, lambda: self._info(url))
        return info

    def open(self, url: str, version: str | None = None) -> BinaryIO:
        def work() -> bytes:
            if version not in (None, self._info(url).version):
                raise ObjectChanged(f"{url} changed")
            return self.objects[url]

        return io.BytesIO(self._call(f"open {url}", FAULTS_OF_READS, work))

    def create(self, url: str, data: bytes, metadata: dict[str, str] | None = None) -> bool:
        made: bool = self._call(f"create {url}", FAULTS_OF_CREATES, lambda: self._create(url, data))
        return made

    def replace(self, url: str, data: bytes) -> None:
        self._call(f"replace {url}", FAULTS_OF_WRITES, lambda: self._set(url, data))

    def replace_version(
        self, url: str, version: str, data: bytes, metadata: dict[str, str] | None = None
    ) -> bool:
        def work() -> bool:
            if url not in self.objects or self._info(url).version != version:
                return False
            self._set(url, data)
            return True

        made: bool = self._call(f"replace {url}", FAULTS_OF_CREATES, work)
        return made

    def delete(self, urls: Iterable[str]) -> None:
        for url in urls:  # S3 deletes the keys of one request one after another
            self._call(f"delete {url}", FAULTS_OF_WRITES, lambda url=url: self._set(url, None))

    def abandoned(self, prefix: str) -> list[str]:
        return []

    def delete_folder(self, url: str) -> None:
        pass


class _Execution:
    """The runs of one scenario, each before its next call."""

    def __init__(self, store: MemoryStore, runs: list[Callable[[], Any]]) -> None:
        self._store, self._blocked = store, threading.Semaphore(0)
        self.trace: tuple[Choice, ...] = ()
        self.preemptions = self.faults = 0
        store.turn, store.answer = self._turn, self._answer
        self._current = 0
        self.runs = [
            Run(threading.Thread(target=self._live, args=(n, work), daemon=True))
            for n, work in enumerate(runs)
        ]
        for n, run in enumerate(self.runs):  # one by one, up to its first call
            self._current = n
            run.thread.start()
            self._wait()

    def _live(self, n: int, work: Callable[[], Any]) -> None:
        run = self.runs[n]
        try:
            run.result = work()
        except BaseException as error:
            run.error = error
        run.is_over = True
        self._blocked.release()

    def _wait(self) -> None:
        if not self._blocked.acquire(timeout=PATIENCE_S):
            raise Violation(
                f"run {self._current} makes no call and does not end after {self.trace}"
            )

    def _turn(self, what: str, faults: tuple[int, ...]) -> int:
        run = self.runs[self._current]
        if threading.current_thread() is not run.thread:  # one that it started: part of its step
            return WELL
        if run.is_dead:  # what it does while it unwinds, a killed process would not do
            return DIES_BEFORE
        run.what, run.faults = what, faults
        self._blocked.release()
        run.go.acquire()
        return run.fault

    def _answer(self, result: object) -> None:
        run = self.runs[self._current]
        said = hashlib.sha256(result if isinstance(result, bytes) else repr(result).encode())
        if threading.current_thread() is run.thread:
            run.history.update(said.digest())
        else:
            run.beside ^= int.from_bytes(said.digest()[:8])

    def choices(self, bounds: Bounds) -> Iterator[Choice]:
        """What may come next, without a fault and a switch first."""
        able = [n for n, run in enumerate(self.runs) if not run.is_over]
        able.sort(key=lambda n: n != self._current)
        for n in able:
            if self._preempts(n) and self.preemptions >= bounds.preemptions:
                continue
            yield n, WELL
            if self.faults < bounds.faults:
                yield from ((n, fault) for fault in self.runs[n].faults)

    def _preempts(self, n: int) -> bool:
        """Whether another run could go on; who goes first is free."""
        return bool(self.trace) and n != self._current and not self.runs[self._current].is_over

    def step(self, choice: Choice) -> None:
        n, fault = choice
        run = self.runs[n]
        self.preemptions += self._preempts(n)
        self.faults += fault != WELL
        self.trace = (*self.trace, choice)
        if fault != WELL:
            run.met.append((fault, run.what))
        self._resume(n, fault)
        if self._store.broken:
            raise Violation(self._store.broken)

    def _resume(self, n: int, fault: int) -> None:
        run = self.runs[n]
        self._current, run.fault, run.is_dead = n, fault, fault in (DIES_BEFORE, DIES_AFTER)
        run.history.update(b"%d;" % fault)
        run.go.release()
        self._wait()

    def key(self) -> bytes:
        digest = hashlib.sha256(repr((self._current, self.preemptions, self.faults)).encode())
        for run in self.runs:
            digest.update(run.history.digest() + b"%d" % run.beside)
        for url, data in sorted(self._store.objects.items()):
            digest.update(url.encode() + hashlib.md5(data).digest())
        return digest.digest()

    def close(self) -> None:
        """End the runs that still wait."""
        for n, run in enumerate(self.runs):
            if not run.is_over:
                self._resume(n, DIES_BEFORE)


@dataclass(frozen=True)
class Scenario:
    """begin() -> a fresh store and its runs; check(store, runs) raises Violation where a promise is
    broken at the end.
    """

    begin: Callable[[], tuple[MemoryStore, list[Callable[[], Any]]]]
    check: Callable[[MemoryStore, list[Run]], None]


def explore(scenario: Scenario, bounds: Bounds) -> Found:
    """All states within the bounds, in an order drawn from a fixed seed. Raises Violation with the
    choices that broke a promise.

    Depth first would spend a limit of states on the last steps of the runs.
    """
    found, seen, checked, rng = Found(), set[bytes](), set[bytes](), random.Random(0)
    branches: list[tuple[Choice, ...]] = [()]
    while branches:
        if len(seen) >= bounds.states:
            found.complete = False
            break
        drawn = rng.randrange(len(branches))
        branches[drawn], branches[-1] = branches[-1], branches[drawn]
        prefix = branches.pop()
        store, works = scenario.begin()
        execution = _Execution(store, works)
        found.executions += 1
        try:
            for choice in prefix:
                execution.step(choice)
            while not all(run.is_over for run in execution.runs):
                if (key := execution.key()) in seen:
                    break
                seen.add(key)
                first, *others = execution.choices(bounds)
                branches += [(*execution.trace, other) for other in others]
                execution.step(first)
            else:
                key = execution.key()
                if key not in checked:
                    checked.add(key)
                    found.ends += 1
                    store.turn, store.answer = lambda *_: WELL, lambda _: None
                    scenario.check(store, execution.runs)
        except Violation as error:
            raise Violation(
                f"{error}\nafter {len(seen)} states, by the choices {execution.trace}"
            ) from error
        finally:
            execution.close()
    found.states = len(seen) + len(checked)
    return found
