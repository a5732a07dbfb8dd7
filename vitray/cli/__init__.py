"""The command line: one file for each command. The only package that prints or sets up logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Annotated, Literal, NoReturn

import typer

from vitray.cli import (
    backfill,
    bench,
    clean,
    compact,
    compare,
    demo,
    export,
    export_model,
    finetune,
    plan,
    redo,
    relabel,
    report,
    run,
    search,
    status,
    submit,
    validate,
)
from vitray.cli.command import Command, CommandGroup, is_usage_error, usage_text
from vitray.cli.console import JsonFormatter, Terminal, error_line, say
from vitray.cli.interrupts import install_handlers
from vitray.errors import VitrayError
from vitray.exit_codes import ExitCode
from vitray.version import __version__

LogFormat = Literal["text", "json"]
COMMANDS = (
    run.run,
    plan.plan,
    bench.bench,
    validate.validate,
    clean.clean,
    demo.demo,
    status.status,
    submit.submit,
    submit.stop,
    redo.redo,
    backfill.backfill,
    compare.compare,
    compact.compact,
    relabel.relabel,
    search.search,
    export.export,
    export_model.export_model,
    report.report,
    finetune.finetune,
)
QUIET_LIBRARIES = (
    "ray",
    "botocore",
    "aiobotocore",
    "s3fs",
    "fsspec",
    "urllib3",
    "httpx",
    "transformers",
)

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label and embed image collections with a Vision Transformer: one Parquet file per shard, "
    "exactly once.",
    epilog="Exit codes: 0 all committed, 1 a system does not work, 2 wrong usage or job, 3 done "
    "but shards were cut short or set aside, 4 too many bad images, 5 compare, export-model: too "
    "few labels agree, 129/130/143 interrupted: run again to continue.",
)
for _command in COMMANDS:
    app.command(cls=Command)(_command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"vitray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="format of warnings and debug logs")
    ] = "text",
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, help="print the version", is_eager=True),
    ] = False,
) -> None:
    terminal = Terminal()
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    terminal.setFormatter(text if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[terminal])
    if not debug:
        for library in QUIET_LIBRARIES:
            logging.getLogger(library).setLevel(logging.ERROR)


def entry() -> NoReturn:
    """The console script.

    Skips the interpreter's clean-up, in which native threads that still wake abort the process.
    """
    code: object = ExitCode.DONE
    install_handlers()
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    with contextlib.suppress(OSError):  # nobody reads the output any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else ExitCode.DONE)


def main() -> None:
    """Run a command; every exception becomes one line on stderr and an exit code."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False, args=_hoist_debug(sys.argv[1:]))
        sys.exit(code if isinstance(code, int) else ExitCode.DONE)
    except VitrayError as error:
        _fail(error, type(error).__name__, error.exit_code, debug)
    except BrokenPipeError:
        os._exit(ExitCode.BROKEN_SYSTEM)
    except Exception as error:
        if is_usage_error(error):
            _fail_usage(error)
        _fail(error, f"unexpected {type(error).__name__}", ExitCode.BROKEN_SYSTEM, debug)


def _hoist_debug(args: list[str]) -> list[str]:
    """The arguments with --debug in front; a user may write it anywhere."""
    if "--debug" not in args:
        return args
    return ["--debug", *(argument for argument in args if argument != "--debug")]


def _fail(error: Exception, kind: str, code: ExitCode, debug: bool) -> NoReturn:
    if debug:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    print(f"{kind}: {error_line(str(error)) or kind}", file=sys.stderr)
    sys.exit(code)


def _fail_usage(error: Exception) -> NoReturn:
    text = error_line(usage_text(error))
    if text:  # empty without a command: click has printed the help instead
        print(f"vitray: {text} (vitray --help)", file=sys.stderr)
    sys.exit(ExitCode.BAD_USAGE)
