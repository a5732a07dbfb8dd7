"""Work that may kill its process, or never end, done in a forked child: a death costs one input,
and the caller lives.

Knows nothing of images. Inputs and results lie in memory that both processes share; a socket says
what is there. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vitray.errors import VitrayError

_STARTED, _DONE = 1, 2
_HEAD = struct.Struct("=qqq")  # the index of the first input, how many come, and their bytes in all
CHUNK_BYTES = (
    4 << 20
    # of inputs that lie there at a time, if one is no longer: a fragment of photographs may have
    # gigabytes
)
# Ray, faulthandler and absl catch these: their reports take locks that a child may never get
_RESET = (
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT),
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPROF),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one input may cost: CPU seconds, seconds without any progress, bytes beyond what the
    worker already holds.
    """

    cpu_s: float = 5.0
    wall_s: float = 60.0
    memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Death:
    """Why an input has no result. timed_out: it used up its CPU seconds, or stood still.
    is_certain: nothing else can be the cause.
    """

    timed_out: bool
    message: str
    is_certain: bool = False


def shared(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that parent and children see alike; freed with their last view."""
    memory = mmap.mmap(-1, max(1, math.prod(shape) * np.dtype(dtype).itemsize))
    return np.ndarray(shape, dtype, memory)


class Pages:
    """Arrays that parent and children see alike. One is `current`; it is used again when nobody
    holds it or a view on it any more.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._pages, self._turn = (
            [shared(shape, dtype) for _ in range(count)],
            shared((1,), np.uint8),
        )

    @property
    def memory(self) -> list[NDArray[Any]]:
        return [*self._pages, self._turn]

    @property
    def current(self) -> NDArray[Any]:
        page: NDArray[Any] = self._pages[self._turn[0]]
        return page

    def turn(self) -> bool:
        """Make another one current. False: all are held."""
        # two references are the list's and the call's; every view on an array holds the array
        # itself
        free = [n for n in range(len(self._pages)) if sys.getrefcount(self._pages[n]) == 2]
        self._turn[0] = free[0] if free else self._turn[0]
        return bool(free)


class Child:
    """A forked process that works on inputs, and on those of later runs too: a fork costs as much
    as ten small images.

    `work(index, data)` leaves its result in memory that was `shared` before. It must not import,
    log or wait for a thread. The process ends with this object, and with the thread that made it.
    """

    def __init__(
        self,
        work: Callable[[int, bytes], None],
        capacity: int,
        limits: Limits,
        memory: Sequence[NDArray[Any]] = (),
    ) -> None:
        """memory: what `work` writes to. Children of other threads, forked later, do not get it."""
        self._work, self._limits = work, limits
        self._states: NDArray[np.uint8] = shared((capacity,), np.uint8)
        self._sizes: NDArray[np.int64] = shared((capacity,), np.int64)
        self._inputs, self._chunk = os.memfd_create("vitray"), cast(mmap.mmap, b"")
        weakref.finalize(self, os.close, self._inputs)
        self._maps: list[Any] = [
            array.base for array in (self._states, *memory)
        ]  # not the arrays: Pages counts who holds them
        self._end: Callable[[], int | None] | None = None
        self.runs = 0

    def run(self, inputs: Sequence[bytes], charge: Callable[[int, Death], None]) -> None:
        """work(i, inputs[i]) was done in order, for no more than `capacity`; charge(i, death) was
        called here where it died.

        A death is charged when it repeats: the first may come from a dying node, or from a
        neighbour's hunger for memory. One by the clock of its CPU seconds is charged at once.
        Raises OSError when no process can be started, VitrayError when it dies outside any work.
        """
        states, suspect = self._states[: len(inputs)], -1
        states[:] = 0
        self.runs += 1
        while (at := int(np.count_nonzero(states == _DONE))) < len(inputs):
            if self._end is None:
                self._start()
            death = self._feed(inputs, at)
            at = int(np.count_nonzero(states == _DONE))
            if death is None or at == len(inputs):
                continue
            if suspect != at and not death.is_certain:
                suspect, states[at] = at, 0
            elif states[at] == _STARTED:
                charge(at, death)
                states[at] = _DONE
            else:
                raise VitrayError(
                    f"a child process {death.message} before its work began. Look for a lack of "
                    f"memory, then run again."
                )

    def _start(self) -> None:
        self._line, theirs = socket.socketpair()
        with theirs:
            for memory in self._maps:
                memory.madvise(mmap.MADV_DOFORK)
            pid = _fork(partial(self._serve, theirs))
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTFORK)
        self._line.setblocking(False)
        self._pidfd = os.pidfd_open(pid)
        self._end = weakref.finalize(self, _reap, os.getpid(), pid, self._pidfd, self._line)

    def _serve(self, line: socket.socket) -> None:
        _limit_memory(self._limits.memory_bytes)
        stream, inputs = line.makefile("rb"), cast(bytes | mmap.mmap, b"")
        while head := stream.read(_HEAD.size):
            start, count, size = _HEAD.unpack(head)
            if size > len(inputs):
                inputs = mmap.mmap(self._inputs, size, prot=mmap.PROT_READ)
            stops = np.cumsum(self._sizes[start : start + count]).tolist()
            for at, begin, stop in zip(range(start, start + count), [0, *stops], stops):
                data = inputs[begin:stop]
                self._states[at] = _STARTED
                # the default action, by the kernel: a Python handler would wait for the C code to
                # return
                signal.setitimer(signal.ITIMER_PROF, self._limits.cpu_s)
                self._work(at, data)
                self._states[at] = _DONE
            line.send(b".")

    def _feed(self, inputs: Sequence[bytes], start: int) -> Death | None:
        """As many inputs as fit are done; else how the process ended: by itself, or because it
        stood still.
        """
        stop, size, room = start, 0, max(CHUNK_BYTES, len(inputs[start]))
        if len(self._chunk) != room:  # what one long input took is given back with the next chunk
            os.truncate(self._inputs, room)
            self._chunk = mmap.mmap(self._inputs, room)  # half the time of write(2)
            self._chunk.madvise(mmap.MADV_DONTFORK)
        while stop < len(inputs) and (filled := size + len(inputs[stop])) <= room:
            self._chunk[size:filled] = inputs[stop]
            self._sizes[stop], size, stop = len(inputs[stop]), filled, stop + 1
        poller, line = select.poll(), self._line.fileno()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(line, select.POLLIN)
        progress, since, stalled, answered = -1, 0.0, False, False
        try:
            self._line.send(_HEAD.pack(start, stop - start, size))
            while not stalled:
                events = dict(
                    poller.poll(self._limits.wall_s * 250)
                )  # ms: looks four times in that span
                if events.get(line, 0) & select.POLLIN and (answered := bool(self._line.recv(1))):
                    return None
                if self._pidfd in events:
                    break
                if (now := int(self._states.sum())) != progress:
                    progress, since = now, time.monotonic()
                stalled = time.monotonic() - since >= self._limits.wall_s
        except ConnectionError:  # it has just died
            pass
        finally:
            if not answered:
                end, self._end = self._end, None
                status = end() if end else None
        return _death(status, stalled, self._limits)


def _reap(owner: int, pid: int, pidfd: int, line: socket.socket) -> int | None:
    """The wait status of a child of this process that was ended; None where somebody else in it
    asked before.
    """
    if os.getpid() != owner:
        return None
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    line.close()
    with suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return None


def _death(status: int | None, stalled: bool, limits: Limits) -> Death:
    if stalled:
        return Death(True, f"stood still for {limits.wall_s:g} s")
    if status is None or not os.WIFSIGNALED(status):
        return Death(
            False, "ended" if status is None else f"ended with exit status {os.WEXITSTATUS(status)}"
        )
    if os.WTERMSIG(status) == signal.SIGPROF:
        return Death(True, f"took more than {limits.cpu_s:g} s of CPU", is_certain=True)
    return Death(False, f"was killed by {signal.Signals(os.WTERMSIG(status)).name}")


def _limit_memory(allowance: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", "rb") as statm:
        cap = int(statm.read().split()[5]) * resource.getpagesize() + allowance
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    # not RLIMIT_AS: CUDA reserves terabytes of addresses
    resource.setrlimit(
        resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard)
    )


def _fork(body: Callable[[], None]) -> int:
    """The process id of a child that runs `body` and ends."""
    prctl, parent = _prctl(), os.getpid()
    with warnings.catch_warnings():
        # of a fork beside threads: the child takes no lock of theirs, and should it stand still
        # after all, _feed ends it
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _become_child(prctl, parent, body)
    return pid


@cache
def _prctl() -> Callable[..., int]:
    function: Callable[..., int] = ctypes.CDLL(None).prctl
    return function


def _become_child(prctl: Callable[..., int], parent: int, body: Callable[[], None]) -> NoReturn:
    status = 70  # EX_SOFTWARE
    try:
        # kept: what a handler alone holds would else be destroyed here, such as Ray Train's actor,
        # and speak on sockets of the parent
        _handlers = [signal.signal(number, signal.SIG_DFL) for number in _RESET]
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            gc.freeze()  # finalizers of the parent's objects must not run here
            logging.disable()
            warnings.simplefilter("ignore")
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), 2
            )  # C libraries print lines about every broken file
            body()
            status = 0
    finally:
        os._exit(status)  # no atexit, no finalizers, no flush of the parent's buffers
