"""What commands print: text, JSON and log messages, without control characters."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vitray.errors import one_line, shortened

if TYPE_CHECKING:
    from rich.live import Live

ERROR_CHARS = 4000


class Screen:
    """What the terminal shows now. view: of a run's progress, while there is one."""

    view: Live | None = None


screen = Screen()


def show(result: Any, as_json: bool, text: str) -> None:
    """Print a result as one JSON object, or its text. result: a dataclass, or a dict of fields."""
    if not as_json:
        say(text)
        return
    say(json.dumps(result if isinstance(result, dict) else dataclasses.asdict(result)))


def say(text: str, err: bool = False) -> None:
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)


def printable(text: str) -> str:
    """The text with `?` for each control character.

    Keys, file names and messages come from data, and a terminal obeys what it receives.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def error_line(text: str) -> str:
    """The text of an error as one printable line."""
    return printable(one_line(shortened(text, ERROR_CHARS), ERROR_CHARS + len("…")))


class JsonFormatter(logging.Formatter):
    """One JSON object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class Terminal(logging.Handler):
    """Writes to the current sys.stderr: while Ray works it is another one than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))
        if screen.view is not None:  # a plain print would tear the view
            screen.view.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
