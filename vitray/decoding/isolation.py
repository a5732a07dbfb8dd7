"""Work that may kill its process or never end, done in a forked child: a death costs one input.

Knows nothing of images. Inputs and results lie in memory that both processes share, and a socket
carries the signals between them. Linux only.
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
_HEAD = struct.Struct("=qqq")  # index of the first input, number of inputs, their total bytes
# of inputs in shared memory at a time, or one larger input: a fragment of photographs may have
# gigabytes
CHUNK_BYTES = 4 << 20
# Ray, faulthandler and absl catch these: their reports take locks that a child may never get
_RESET = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGPROF,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one input may cost.

    cpu_s: CPU seconds. wall_s: seconds without any progress. memory_bytes: in addition to what the
    process has already.
    """

    cpu_s: float = 5.0
    wall_s: float = 60.0
    memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Death:
    """Why an input has no result.

    timed_out: it used up its CPU seconds, or made no progress. is_certain: the input is the cause.
    """

    timed_out: bool
    message: str
    is_certain: bool = False


def shared(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros in memory that parent and children share; freed with their last view."""
    memory = mmap.mmap(-1, max(1, math.prod(shape) * np.dtype(dtype).itemsize))
    return np.ndarray(shape, dtype, memory)


class Pages:
    """Arrays that parent and children share. One is `current`.

    An array is used again once nothing refers to it or to a view on it, or when next_free says so.
    """

    def __init__(
        self, arrays: list[NDArray[Any]], next_free: Callable[[], int] | None = None
    ) -> None:
        """arrays: each on a mapping of its own, which this object alone refers to.

        next_free: waits for a free array, and returns its index. For arrays that others use, too.
        """
        self._pages = arrays
        self._next_free = next_free
        self._turn = shared((1,), np.uint8)  # the index of the current one

    @property
    def memory(self) -> list[NDArray[Any]]:
        return [*self._pages, self._turn]

    @property
    def number(self) -> int:
        """The index of the current array."""
        return int(self._turn[0])

    @property
    def current(self) -> NDArray[Any]:
        page: NDArray[Any] = self._pages[self._turn[0]]
        return page

    def turn(self) -> bool:
        """Make a free array current. False, and no change, if all are in use."""
        if self._next_free is not None:
            self._turn[0] = self._next_free()
            return True
        # two references are the list's and the call's; every view on an array refers to the array
        # itself
        free = [n for n in range(len(self._pages)) if sys.getrefcount(self._pages[n]) == 2]
        if not free:
            return False
        self._turn[0] = free[0]
        return True


class Child:
    """A forked process that works on the inputs of several runs.

    One process serves several runs, because a fork costs as much as ten small images.
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
        self._work = work
        self._limits = limits
        self._states: NDArray[np.uint8] = shared((capacity,), np.uint8)
        self._sizes: NDArray[np.int64] = shared((capacity,), np.int64)
        self._inputs = os.memfd_create("vitray")
        self._chunk = cast(mmap.mmap, b"")
        weakref.finalize(self, os.close, self._inputs)
        # not the arrays: Pages counts the references to them
        self._maps: list[Any] = [array.base for array in (self._states, *memory)]
        self._end: Callable[[], int | None] | None = None
        self.runs = 0

    def run(self, inputs: Sequence[bytes], charge: Callable[[int, Death], None]) -> None:
        """Do work(i, inputs[i]) in order, for at most `capacity` inputs.

        Calls charge(i, death) in this process for an input that kills the child. A death is charged
        when it repeats: the first one may come from a dying node, or from another process that
        takes the memory. A death by CPU time is charged at once. Raises OSError when no process can
        be started, and VitrayError when it dies outside any work.
        """
        states = self._states[: len(inputs)]
        states[:] = 0
        suspect = -1  # the input at which the child died last
        self.runs += 1
        while (at := int(np.count_nonzero(states == _DONE))) < len(inputs):
            if self._end is None:
                self._start()
            death = self._feed(inputs, at)
            at = int(np.count_nonzero(states == _DONE))
            if death is None or at == len(inputs):
                continue
            if suspect != at and not death.is_certain:
                suspect = at
                states[at] = 0
            elif states[at] == _STARTED:
                charge(at, death)
                states[at] = _DONE
            else:
                raise VitrayError(
                    f"a child process {death.message} before its work began. "
                    "Look for a lack of memory, then run again."
                )

    def _start(self) -> None:
        self._socket, child_socket = socket.socketpair()
        with child_socket:
            for memory in self._maps:
                memory.madvise(mmap.MADV_DOFORK)
            pid = _fork(partial(self._serve, child_socket))
            for memory in self._maps:
                memory.madvise(mmap.MADV_DONTFORK)
        self._socket.setblocking(False)
        self._pidfd = os.pidfd_open(pid)
        self._end = weakref.finalize(self, _reap, os.getpid(), pid, self._pidfd, self._socket)

    def _serve(self, connection: socket.socket) -> None:
        """The child's loop: reads heads of chunks, works on them, answers each chunk with a dot."""
        _limit_memory(self._limits.memory_bytes)
        stream = connection.makefile("rb")
        inputs = cast(bytes | mmap.mmap, b"")
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
            connection.send(b".")

    def _feed(self, inputs: Sequence[bytes], start: int) -> Death | None:
        """None once the inputs of one chunk are done, else how the process ended."""
        stop, size = self._fill(inputs, start)
        stalled = False
        is_done = False
        try:
            self._socket.send(_HEAD.pack(start, stop - start, size))
            is_done, stalled = self._wait()
            if is_done:
                return None
        except ConnectionError:  # it has just died
            pass
        finally:
            if not is_done:
                end, self._end = self._end, None
                status = end() if end else None
        return _death(status, stalled, self._limits)

    def _fill(self, inputs: Sequence[bytes], start: int) -> tuple[int, int]:
        """Copy the inputs that fit into shared memory; returns where they stop, and their size."""
        stop = start
        size = 0
        chunk_bytes = max(CHUNK_BYTES, len(inputs[start]))
        if (
            len(self._chunk) != chunk_bytes
        ):  # what one long input took is given back with the next chunk
            os.truncate(self._inputs, chunk_bytes)
            self._chunk = mmap.mmap(self._inputs, chunk_bytes)  # half the time of write(2)
            self._chunk.madvise(mmap.MADV_DONTFORK)
        while stop < len(inputs) and (filled := size + len(inputs[stop])) <= chunk_bytes:
            self._chunk[size:filled] = inputs[stop]
            self._sizes[stop] = len(inputs[stop])
            size = filled
            stop += 1
        return stop, size

    def _wait(self) -> tuple[bool, bool]:
        """Whether the child has answered, and whether it made no progress for wall_s."""
        poller = select.poll()
        descriptor = self._socket.fileno()
        poller.register(self._pidfd, select.POLLIN)
        poller.register(descriptor, select.POLLIN)
        progress = -1
        since = 0.0
        while True:
            events = dict(poller.poll(self._limits.wall_s * 250))  # ms: four times in that span
            if events.get(descriptor, 0) & select.POLLIN and self._socket.recv(1):
                return True, False
            if self._pidfd in events:
                return False, False
            current = int(self._states.sum())
            if current != progress:
                progress = current
                since = time.monotonic()
            if time.monotonic() - since >= self._limits.wall_s:
                return False, True


def _reap(owner: int, pid: int, pidfd: int, connection: socket.socket) -> int | None:
    """End a child of this process; returns its wait status, or None if it was reaped already."""
    if os.getpid() != owner:
        return None
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
    connection.close()
    with suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return None


def _death(status: int | None, stalled: bool, limits: Limits) -> Death:
    if stalled:
        return Death(True, f"made no progress for {limits.wall_s:g} s")
    if status is None:
        return Death(False, "ended")
    if not os.WIFSIGNALED(status):
        return Death(False, f"ended with exit status {os.WEXITSTATUS(status)}")
    if os.WTERMSIG(status) == signal.SIGPROF:
        return Death(True, f"took more than {limits.cpu_s:g} s of CPU", is_certain=True)
    return Death(False, f"was killed by {signal.Signals(os.WTERMSIG(status)).name}")


def _limit_memory(allowance: int) -> None:
    """Cap the memory of this process at what it has plus `allowance` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", "rb") as statm:
        cap = int(statm.read().split()[5]) * resource.getpagesize() + allowance
    # not RLIMIT_AS: CUDA reserves terabytes of addresses
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = cap if hard == resource.RLIM_INFINITY else min(cap, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _fork(body: Callable[[], None]) -> int:
    """The process id of a child that runs `body` and ends."""
    prctl = _prctl()
    parent = os.getpid()
    with warnings.catch_warnings():
        # The warning is about a fork of a process with threads. The child takes no lock of theirs,
        # and _feed ends it if it still makes no progress.
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
        # kept, or objects to which only a handler refers would be destroyed here. Such as Ray
        # Train's actor, they would then use sockets of the parent.
        _handlers = [signal.signal(number, signal.SIG_DFL) for number in _RESET]
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            gc.freeze()  # finalizers of the parent's objects must not run here
            logging.disable()
            warnings.simplefilter("ignore")
            # C libraries print lines about every broken file
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            body()
            status = 0
    finally:
        os._exit(status)  # no atexit, no finalizers, no flush of the parent's buffers
