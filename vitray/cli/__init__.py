"""The command line: each command is one call. The only place that prints, and that configures logging."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Annotated, Any, Literal, NoReturn

import typer

from vitray.cli import adapting, making, operating
from vitray.cli.console import JsonFormatter, Terminal, on_signal, one_line, say
from vitray.errors import VitrayError
from vitray.version import __version__

LogFormat = Literal["text", "json"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label and embed image collections with a Vision Transformer: one Parquet file a shard, exactly once.",
    epilog="Exit codes: 0 all committed, 1 a broken system, 2 bad usage or job, 3 done but shards were cut short or set aside, "
    "4 too many bad images, 5 compare, export: too few labels agree, 129/130/143 interrupted: run again to go on.",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"vitray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    log_format: Annotated[LogFormat, typer.Option("--log-format", help="of warnings, and of --debug")] = "text",
    version: Annotated[bool, typer.Option("--version", callback=_version, help="print the version", is_eager=True)] = False,
) -> None:
    terminal = Terminal()
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    terminal.setFormatter(text if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[terminal])
    if not debug:
        for noisy in ("ray", "botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "httpx", "transformers"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


for command in (*making.COMMANDS, *operating.COMMANDS, *adapting.COMMANDS):
    app.command()(command)


def entry() -> NoReturn:
    """The console script. Ends without the interpreter's clean-up, where native threads that still wake abort the process."""
    code: object = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, on_signal)
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def main() -> None:
    """Runs a command, turns every exception into one line and an exit code."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, args=_hoist_debug(sys.argv[1:]))
        sys.exit(code if isinstance(code, int) else 0)
    except VitrayError as error:
        _fail(error, type(error).__name__, error.exit_code, debug)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click: bad usage
            if text := one_line(_usage(error)):  # empty: no command was given, and the help stands there
                print(f"vitray: {text} (vitray --help)", file=sys.stderr)
            sys.exit(2)
        _fail(error, f"unexpected {type(error).__name__}", 1, debug)


def _usage(error: Any) -> str:
    """What click says, or how to set a field of the job that was written as an option."""
    from vitray.job import Job

    field = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    if field in Job.model_fields.keys() - {"source", "model", "out"} and "sets" in {p.name for p in error.ctx.command.params}:
        return f"`{field}` is a field of the job: write --set {field}=…"
    return str(error.format_message())


def _hoist_debug(args: list[str]) -> list[str]:
    """--debug is taken anywhere on the line."""
    return (["--debug"] if "--debug" in args else []) + [a for a in args if a != "--debug"]


def _fail(error: Exception, kind: str, code: int, debug: bool) -> NoReturn:
    if debug:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    print(f"{kind}: {one_line(str(error)) or kind}", file=sys.stderr)
    sys.exit(code)
