"""What a signal does to a command: a policy that decides, and the handlers that obey it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn

from vitray.cli.console import error_json, screen

STOP_S = 15.0  # for writes that have begun, and for removing temporary files
REPORT_S = 3.0  # for reporting the end of the command to other systems
RUN_RESUMES = "what is staged stays. Run the same command again to continue."


class Phase(Enum):
    """What an interruption would cost at this moment."""

    TEMPORARY_FILES = auto()  # they must be removed first
    CRASH_SAFE = auto()  # nothing: the same command continues
    WRITING = auto()  # crash-safe, but a run saves work if it can finish its writes


class Action(Enum):
    """What to do about a signal."""

    FINISH_WRITES = auto()
    CLEAN_UP = auto()
    EXIT = auto()


@dataclass(frozen=True, slots=True)
class InterruptPolicy:
    """Decides what a signal does in a phase of the command."""

    phase: Phase

    def action(self, number: int, *, is_first: bool, is_ray_loaded: bool) -> Action:
        """What to do about signal `number`.

        SIGTERM is what a spot machine receives some seconds before it goes away. A second signal
        always ends the process. While Ray is loaded no exception is raised: in its C++ code one
        can abort the process.
        """
        if not is_first:
            return Action.EXIT
        if self.phase is Phase.WRITING and number == signal.SIGTERM:
            return Action.FINISH_WRITES
        if self.phase is Phase.TEMPORARY_FILES and not is_ray_loaded:
            return Action.CLEAN_UP
        return Action.EXIT


@dataclass(slots=True)
class _Command:
    """The running command, as the handlers see it.

    advice: the next step for the user. folders: temporary ones, removed before an exit at once.
    listeners: are called with the exit code before an exit at once.
    """

    policy: InterruptPolicy = InterruptPolicy(Phase.TEMPORARY_FILES)
    advice: str = "run the same command again."
    # a list, because handlers can interrupt each other and an Event's lock cannot stand that
    signals: list[int] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)
    folders: list[str] = field(default_factory=list)
    listeners: list[Callable[[int], object]] = field(default_factory=list)


_command = _Command()


def install_handlers() -> None:
    """Handle SIGTERM and SIGINT, and SIGHUP unless it is ignored, as under nohup."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_signal)


def end_at_once_when_interrupted(advice: str) -> None:
    """Declare that the command survives a crash at any moment, and say what the user does next."""
    _command.advice = advice
    _command.policy = InterruptPolicy(Phase.CRASH_SAFE)


def remove_when_interrupted(folder: str) -> None:
    """Remove this temporary folder also where a signal ends the process at once."""
    _command.folders.append(folder)


@contextlib.contextmanager
def on_interrupt(listener: Callable[[int], object]) -> Iterator[None]:
    """Within the block, call this with the exit code where a signal ends the process at once.

    It has REPORT_S.
    """
    _command.listeners.append(listener)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # a signal has taken it
            _command.listeners.remove(listener)


def finish_writes_when_terminated(advice: str) -> threading.Event:
    """Give a run STOP_S seconds to finish its writes after SIGTERM.

    Returns the event that SIGTERM sets.
    """
    _command.advice = advice
    _command.policy = InterruptPolicy(Phase.WRITING)
    threading.Thread(target=_end_after_stop, daemon=True).start()
    return _command.stop


def _end_after_stop() -> None:
    _command.stop.wait()
    time.sleep(STOP_S)
    _end(signal.SIGTERM, Action.EXIT)


def on_signal(number: int, _frame: object) -> None:
    """The handler of all signals."""
    _command.signals.append(number)
    action = _command.policy.action(
        number, is_first=len(_command.signals) == 1, is_ray_loaded="ray" in sys.modules
    )
    if action is not Action.FINISH_WRITES:
        _end(number, action)
    # Ray's own handler, in C++, ran before this one and set an alarm that aborts after 3 s
    signal.alarm(0)
    _command.stop.set()


def _end(number: int, action: Action) -> NoReturn:
    code = 128 + number
    with contextlib.suppress(OSError, ValueError):
        if screen.view is not None:
            os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the view hides the cursor
        line = f"\ninterrupted; {_command.advice}"
        if screen.is_json:
            line = error_json("Interrupted", line.strip(), code)
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
    if action is Action.EXIT:
        _call_listeners(code)
        for folder in _command.folders:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)
    threading.Timer(STOP_S, os._exit, [code]).start()
    raise SystemExit(code)  # it runs the code that removes temporary files


def _call_listeners(code: int) -> None:
    """Call each listener once, also where a second signal arrives meanwhile.

    In a thread: the main one may hold a lock that a listener needs.
    """
    listeners = list(_command.listeners)
    _command.listeners.clear()
    for listener in listeners:
        thread = threading.Thread(target=listener, args=(code,), daemon=True)
        thread.start()
        thread.join(REPORT_S)
