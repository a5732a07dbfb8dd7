"""What commands print: text, JSON and log messages, without control characters."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vitray.cli.json_output import ErrorLine, LogLine, json_text
from vitray.clock import utc_now
from vitray.errors import one_line, shortened

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

ERROR_CHARS = 4000
OWN = "vitray"  # the first part of the names of vitray's own loggers

VIEWS_PER_S = 8
log = logging.getLogger(__name__)


class Screen:
    """What the terminal shows now, and how stderr is written.

    view: of a run's progress, while there is one. is_json: whether each line on stderr is a JSON
    object, as `--log-format json` asks for.
    """

    view: Live | None = None
    is_json: bool = False


screen = Screen()


def draws_view() -> bool:
    """Whether progress is a live view: stderr is a terminal, and its lines are not JSON."""
    return sys.stderr.isatty() and not screen.is_json


@contextlib.contextmanager
def live_view(view: RenderableType) -> Iterator[None]:
    """Draw a view on stderr during a `with` block, several times a second, by another thread.

    It is removed after a block that ended well, and stays after an error.
    """
    from rich.console import Console
    from rich.live import Live

    live = Live(
        view,
        console=Console(stderr=True),
        refresh_per_second=VIEWS_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with live:
        screen.view = live
        try:
            yield
            live.transient = True
        finally:
            screen.view = None


def show(result: Any, as_json: bool, text: str) -> None:
    """Print a result as one JSON object, or its text. result: of a type in json_output.SCHEMAS."""
    say(json_text(result) if as_json else text)


def say(text: str, err: bool = False) -> None:
    """Print text; on stderr as a log line where that is JSON."""
    if err and screen.is_json:
        text = json_text(LogLine(utc_now(), "INFO", __name__, text))
    print(printable(text), file=sys.stderr if err else sys.stdout, flush=True)


def say_error(kind: str, message: str, exit_code: int, text: str = "") -> None:
    """Print the error that ends a command, on one line. text: instead of `kind: message`."""
    line = text or f"{kind}: {message}"
    if screen.is_json:
        line = error_json(kind, message, exit_code)
    print(line, file=sys.stderr, flush=True)


def error_json(kind: str, message: str, exit_code: int) -> str:
    """The error that ends a command as one JSON object."""
    return json_text(ErrorLine(utc_now(), "ERROR", kind, message, int(exit_code)))


def printable(text: str) -> str:
    """The text with `?` for each control character.

    Keys, file names and messages come from data, and a terminal obeys what it receives.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def error_line(text: str) -> str:
    """The text of an error as one printable line."""
    return printable(one_line(shortened(text, ERROR_CHARS), ERROR_CHARS + len("…")))


def set_up_logging(debug: bool) -> None:
    """Write vitray's warnings to the terminal; with `debug` everything that any logger has."""
    terminal = Terminal()
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    terminal.setFormatter(JsonFormatter() if screen.is_json else text)
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[terminal])


def take_over_messages(debug: bool) -> None:
    """Make every message of this process a log message: warnings, and errors that nobody catches.

    Without `debug` warnings of libraries are dropped. Call it before libraries are imported: it
    concerns the loggers that are created afterwards.
    """
    logging.captureWarnings(True)
    if not debug:
        logging.setLoggerClass(QuietLogger)
    if screen.is_json:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # downloads draw on stderr
        # otherwise Python prints these two as text
        threading.excepthook = lambda failed: _log_uncaught(
            failed.exc_type, failed.exc_value, failed.exc_traceback
        )
        sys.unraisablehook = lambda failed: _log_uncaught(
            failed.exc_type, failed.exc_value, failed.exc_traceback
        )


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    info = (kind, error, trace) if error is not None else None
    log.error("an exception that nothing caught: %s", kind.__name__, exc_info=info)


class QuietLogger(logging.Logger):
    """A logger that writes vitray's own messages, and only errors of libraries.

    Torch and transformers add handlers of their own, and set the levels of their loggers when they
    are imported. So neither a level nor a filter of ours would stop their warnings.
    """

    def isEnabledFor(self, level: int) -> bool:
        is_own = self.name.partition(".")[0] == OWN
        return (is_own or level >= logging.ERROR) and super().isEnabledFor(level)


class JsonFormatter(logging.Formatter):
    """One JSON object on each line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        traceback = self.formatException(record.exc_info) if record.exc_info else None
        line = LogLine(moment, record.levelname, record.name, record.getMessage(), traceback)
        return json_text(line)


class Terminal(logging.Handler):
    """Writes to the current sys.stderr: while Ray works it is another one than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        text = printable(self.format(record))
        if screen.view is not None:  # a plain print would tear the view
            screen.view.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)
