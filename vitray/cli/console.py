"""What every command shares: options, the job they name, what they print, and what a signal does to
a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from vitray.errors import shortened
from vitray.operations.costing import read_plan

if TYPE_CHECKING:
    from vitray.job import Job
    from vitray.pipeline import Progress

STOP_S = 15.0
EVERY_S = 10.0
LINE = 4000  # characters of an error
RUN_STAYS = "what is staged stays. Run the same command again to go on."
_live: list[Any] = []  # the view on the terminal, while there is one

Target = Annotated[
    str,
    typer.Argument(
        metavar="JOB.yaml|SOURCE",
        help="a job file (.yaml, .yml, .json), or images: path, glob, prefix, s3://…",
    ),
]
Model = Annotated[
    str | None, typer.Option("--model", help="Hugging Face id, local directory or s3:// directory")
]
Out = Annotated[
    str | None, typer.Option("--out", help="output directory, local (~ is your home) or s3://")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="override a field of the job (repeatable)"),
]
OutArgument = Annotated[str, typer.Argument(metavar="OUT", help="a dataset directory")]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="a Ray cluster, or local for one of our own (default: RAY_ADDRESS, else none on a "
        "CPU)",
    ),
]
JobAddress = Annotated[
    str,
    typer.Option("--address", metavar="URL", help="the cluster's job API, like http://head:8265"),
]
Open = Annotated[
    bool, typer.Option("--allow-open-cluster", help="join a Ray cluster that asks for no token")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def run_shown(
    job: Job,
    address: str | None,
    allow_open_cluster: bool,
    as_json: bool,
    prune: bool = False,
    planned: str | None = None,
) -> NoReturn:
    from vitray.operations.watching import summary
    from vitray.pipeline import run as run_job

    expected = None if planned is None else read_plan(planned)
    end_at_once_when_interrupted(RUN_STAYS)
    threading.Thread(target=_end_if_stopped, daemon=True).start()
    with watched() as report:
        result = run_job(
            job,
            address=address,
            prune=prune,
            progress=report,
            stop=_stop,
            allow_open_cluster=allow_open_cluster,
            planned=expected,
        )
    show(result, as_json, summary(result, job))
    raise typer.Exit(result.exit_code)


@contextlib.contextmanager
def watched() -> Iterator[Callable[[Progress], None]]:
    """What shows a run's progress: a view on a terminal, else one JSON line in EVERY_S, and one at
    the end.
    """
    from rich.console import Console
    from rich.live import Live

    from vitray.operations.watching import json_line, view

    if sys.stderr.isatty():
        live = Live(
            console=Console(stderr=True),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with live:
            _live.append(live)
            try:
                yield _at_most_every(
                    0.5, lambda progress: live.update(view(progress), refresh=True)
                )
            finally:
                _live.clear()
        return
    yield _at_most_every(
        EVERY_S, lambda progress: print(json_line(progress), file=sys.stderr, flush=True)
    )


def _at_most_every(seconds: float, tell: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """And whenever all has just been done."""
    last, was_over = time.monotonic() - seconds, False

    def report(progress: Progress) -> None:
        nonlocal last, was_over
        is_over = progress.shards_done + progress.set_aside >= progress.shards
        if progress.shards and ((is_over and not was_over) or time.monotonic() - last >= seconds):
            last = time.monotonic()
            tell(progress)
        was_over = is_over

    return report


def job_of(target: str, model: str | None, out: str | None, sets: list[str] | None) -> Job:
    from vitray.job import load_job, make_job, parse_set

    overrides = parse_set(sets or []) | {
        name: value for name, value in (("model", model), ("out", out)) if value is not None
    }
    return (
        load_job(target, overrides)
        if is_file(target)
        else make_job({"source": target, **overrides})
    )


def is_file(target: str) -> bool:
    from vitray.job import is_job_file

    return is_job_file(target)


def show(found: Any, as_json: bool, text: str) -> None:
    say(json.dumps(dataclasses.asdict(found)) if as_json else text)


def say(text: str, err: bool = False) -> None:
    print(plain(text), file=sys.stderr if err else sys.stdout, flush=True)


def plain(text: str) -> str:
    """Without control characters: keys, file names and messages come from data, and a terminal
    obeys what it is sent.
    """
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = {
            "at": at,
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        return json.dumps(
            said | ({"traceback": self.formatException(record.exc_info)} if record.exc_info else {})
        )


class Terminal(logging.Handler):
    """Writes to what sys.stderr is now: while Ray runs it is another one than at the start."""

    def emit(self, record: logging.LogRecord) -> None:
        text = plain(self.format(record))
        if _live:  # above the view, which would else be torn
            _live[0].console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


_stop, _is_running = threading.Event(), threading.Event()
_farewell = ["run the same command again."]
_signals: list[
    int
] = []  # that came; an Event's lock is not for handlers that may interrupt each other


def end_at_once_when_interrupted(text: str) -> None:
    """For a command that stands a crash at any moment; others have files that they take away when a
    first signal ends them.
    """
    _farewell.append(text)


def _end_if_stopped() -> None:
    """SIGTERM is what a machine that goes away sends, some seconds before: writes that began get
    STOP_S to end.
    """
    _is_running.set()
    _stop.wait()
    time.sleep(STOP_S)
    _end(signal.SIGTERM)


def on_signal(number: int, _frame: object) -> None:
    """The first SIGTERM lets a run end what it writes. All else ends it at once, as a crash would,
    which is safe at any moment.
    """
    _signals.append(number)
    if number != signal.SIGTERM or not _is_running.is_set() or len(_signals) > 1:
        _end(number)
    signal.alarm(
        0
        # Ray's own handler in C++, which came before this one, has set an alarm that aborts the
        # process after 3 s
    )
    _stop.set()


def _end(number: int) -> NoReturn:
    """At once for what a crash does not harm, and where Ray is: in its C++ an exception can abort
    the process.
    """
    with contextlib.suppress(OSError, ValueError):
        if _live:
            os.write(sys.stderr.fileno(), b"\x1b[?25h")  # the view hides the cursor
        os.write(sys.stderr.fileno(), f"\ninterrupted; {_farewell[-1]}\n".encode())
    if len(_farewell) > 1 or len(_signals) > 1 or "ray" in sys.modules:
        os._exit(128 + number)
    threading.Timer(STOP_S, os._exit, [128 + number]).start()
    raise SystemExit(128 + number)  # what takes scratch files away does so


def one_line(text: str) -> str:
    return plain(" ".join(shortened(text, LINE).split()))
