"""The exit codes of the command line: each has one meaning, in every command."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended. Codes above 128 are 128 and the number of the signal, as in a shell."""

    DONE = 0
    BROKEN_SYSTEM = 1  # running again may help
    BAD_USAGE = 2  # a wrong command, job or model: running again does not help
    INCOMPLETE = 3  # done, but shards were cut short or set aside
    TOO_MANY_BAD_IMAGES = 4
    TOO_LITTLE_AGREEMENT = 5
    STALE = 6  # the last complete run is older than --max-age
    BUDGET_SPENT = 7  # the run ended at --max-hours or --max-cost: running again continues
    TERMINAL_CLOSED = 129
    INTERRUPTED = 130  # by Ctrl-C, or by a no to a question
    TERMINATED = 143
