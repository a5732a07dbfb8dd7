"""Work that may kill its process, or never end, done in forked children: a death costs one step, and the caller lives.

Knows nothing of images. Results travel through memory that both processes share (`shared`). Linux only.
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
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from vitray.errors import VitrayError

_STARTED, _DONE = 1, 2
# Ray, faulthandler and absl catch these: their reports take locks that a child may never get
_RESET = (
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT),
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPROF),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may cost: CPU seconds, seconds without any progress, bytes beyond what the worker already holds."""

    cpu_s: float = 10.0  # decoding and resizing 50 MP, the default pixel cap, takes about 1 s
    wall_s: float = 60.0
    memory_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class Death:
    """Why a step has no result. timed_out: it used up its CPU seconds, or stood still."""

    timed_out: bool
    message: str


def shared(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that parent and children see alike; freed with their last view."""
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize))
    return np.frombuffer(memory, dtype, count).reshape(shape)


def run_isolated(step: Callable[[int], None], steps: int, charge: Callable[[int, Death], None], limits: Limits) -> None:
    """step(0) ... step(steps - 1) were done in children, in order; charge(i, death) was called here for those that died.

    A death is charged when it repeats: the first may come from a dying node, or from a neighbour's hunger for memory.
    `step` must not import, log or wait for a thread. Raises OSError when no child can be started, VitrayError when children
    die outside any step.
    """
    states: NDArray[np.uint8] = shared((steps,), np.uint8)
    suspect = -1
    while (at := int(np.count_nonzero(states == _DONE))) < steps:
        death = _wait(_fork(partial(_child, step, at, states, limits)), states, limits)
        at = int(np.count_nonzero(states == _DONE))
        if at == steps:
            return
        if suspect != at:
            suspect, states[at] = at, 0
        elif states[at] == _STARTED:
            charge(at, death)
            states[at] = _DONE
        else:
            raise VitrayError(
                f"a child process {death.message} before its work began. Look for a lack of memory, then run again."
            )


def _child(step: Callable[[int], None], start: int, states: NDArray[np.uint8], limits: Limits) -> None:
    _limit_memory(limits.memory_bytes)
    for at in range(start, len(states)):
        states[at] = _STARTED
        # the default action, by the kernel: a Python handler would wait for the C code to return
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        step(at)
        states[at] = _DONE


def _limit_memory(allowance: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm", "rb") as statm:
        cap = int(statm.read().split()[5]) * resource.getpagesize() + allowance
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    # not RLIMIT_AS: CUDA reserves terabytes of addresses
    resource.setrlimit(resource.RLIMIT_DATA, (cap if hard == resource.RLIM_INFINITY else min(cap, hard), hard))


def _fork(body: Callable[[], None]) -> int:
    """The process id of a child that runs `body` and ends."""
    prctl, parent = _prctl(), os.getpid()
    with warnings.catch_warnings():
        # of a fork beside threads: the child takes no lock of theirs, and should it stand still after all, _wait ends it
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
        for number in _RESET:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() == parent:
            gc.freeze()  # finalizers of the parent's objects must not run here
            logging.disable()
            warnings.simplefilter("ignore")
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries print lines about every broken file
            body()
            status = 0
    finally:
        os._exit(status)  # no atexit, no finalizers, no flush of the parent's buffers


def _wait(pid: int, states: NDArray[np.uint8], limits: Limits) -> Death:
    """How the child ended, by itself or because it stood still."""
    pidfd, status = os.pidfd_open(pid), None
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    progress, since, stalled = -1, 0.0, False
    try:
        while not stalled and not poller.poll(limits.wall_s * 250):  # ms: looks four times in that span
            if (now := int(states.sum())) != progress:
                progress, since = now, time.monotonic()
            stalled = time.monotonic() - since >= limits.wall_s
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        with suppress(ChildProcessError):  # somebody else in this process reaped it
            status = os.waitpid(pid, 0)[1]
    if stalled:
        return Death(True, f"stood still for {limits.wall_s:g} s")
    if status is None or not os.WIFSIGNALED(status):
        return Death(False, "ended" if status is None else f"ended with exit status {os.WEXITSTATUS(status)}")
    if os.WTERMSIG(status) == signal.SIGPROF:
        return Death(True, f"took more than {limits.cpu_s:g} s of CPU")
    return Death(False, f"was killed by {signal.Signals(os.WTERMSIG(status)).name}")
