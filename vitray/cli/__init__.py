"""The command line: one file for each command. The only package that prints or sets up logging."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal, NoReturn

import typer

from vitray.cli import (
    accept,
    backfill,
    bench,
    check,
    clean,
    compact,
    compare,
    demo,
    export,
    export_model,
    finetune,
    plan,
    promote,
    redo,
    relabel,
    remove,
    report,
    rollback,
    run,
    runs,
    search,
    status,
    submit,
    validate,
)
from vitray.cli.command import Command, CommandGroup, is_usage_error, usage_text
from vitray.cli.console import (
    error_line,
    say,
    say_error,
    screen,
    set_up_logging,
    take_over_messages,
)
from vitray.cli.interrupts import install_handlers
from vitray.errors import VitrayError
from vitray.exit_codes import ExitCode
from vitray.version import __version__

LogFormat = Literal["text", "json"]
# by the panel of `vitray --help` that shows them
COMMANDS: dict[str, list[Callable[..., None]]] = {
    "Label and embed": [run.run, plan.plan, check.check, backfill.backfill, relabel.relabel],
    "Look at a dataset": [
        status.status,
        runs.runs,
        validate.validate,
        report.report,
        compare.compare,
        search.search,
    ],
    "Change a dataset": [accept.accept, redo.redo, clean.clean, remove.remove],
    "Publish": [promote.promote, rollback.rollback, export.export, compact.compact],
    "Models": [finetune.finetune, export_model.export_model],
    "Clusters": [submit.submit, submit.stop],
    "Measure and try out": [bench.bench, demo.demo],
}
LOG_FORMAT = "VITRAY_LOG_FORMAT"  # environment variable that replaces the option
HELP_FLAGS = ["-h", "--help"]

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": HELP_FLAGS},
    pretty_exceptions_enable=False,
    help="Label and embed image collections with a Vision Transformer: one Parquet file per shard, "
    "exactly once.",
    epilog="Exit codes: 0 all committed, 1 a system does not work, 2 wrong usage or job, 3 done "
    "but shards were cut short or set aside, 4 too many bad images, 5 compare, export-model: too "
    "few labels agree, 6 status --max-age: the last complete run is older, 7 run --max-hours or "
    "--max-cost: the limit is reached and the same command continues, 129/130/143 interrupted: run "
    "again to continue.",
)
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        app.command(
            cls=Command, rich_help_panel=_panel, context_settings={"help_option_names": HELP_FLAGS}
        )(_command)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        say(f"vitray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            "--log-format",
            envvar=LOG_FORMAT,
            help=f"json: stderr has one JSON object per line, errors too; or set {LOG_FORMAT}",
        ),
    ] = "text",
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, help="print the version", is_eager=True),
    ] = False,
) -> None:
    set_up_logging(debug)


def entry() -> NoReturn:
    """The console script.

    Skips the interpreter's clean-up, in which native threads that still wake abort the process.
    """
    code: object = ExitCode.DONE
    install_handlers()
    options, _ = split_options(sys.argv[1:])
    screen.is_json = is_json_asked(options, os.environ)
    take_over_messages("--debug" in options)
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
    options, rest = split_options(sys.argv[1:])
    debug = "--debug" in options
    screen.is_json = is_json_asked(options, os.environ)
    try:
        code = app(standalone_mode=False, args=[*options, *rest])
        sys.exit(code if isinstance(code, int) else ExitCode.DONE)
    except VitrayError as error:
        _fail(error, type(error).__name__, error.exit_code, debug)
    except BrokenPipeError:
        os._exit(ExitCode.BROKEN_SYSTEM)
    except Exception as error:
        if is_usage_error(error):
            _fail_usage(error)
        _fail(error, f"unexpected {type(error).__name__}", ExitCode.BROKEN_SYSTEM, debug)


def split_options(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options --debug and --log-format, and all other arguments.

    A user may write these two anywhere, also behind the command.
    """
    end = args.index("--") if "--" in args else len(args)
    options, rest = list[str](), list[str]()
    words = iter(args[:end])
    for word in words:
        if word == "--log-format":
            options += [word, next(words, "")]
        elif word.startswith("--log-format="):
            options += word.split("=", 1)
        else:
            (options if word == "--debug" else rest).append(word)
    return options, [*rest, *args[end:]]


def is_json_asked(options: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether stderr is JSON. options: as split_options gives them."""
    formats = [value for name, value in pairwise(options) if name == "--log-format"]
    return (formats[-1] if formats else environment.get(LOG_FORMAT)) == "json"


def _fail(error: Exception, kind: str, code: ExitCode, debug: bool) -> NoReturn:
    if debug:
        logging.getLogger(__name__).error("traceback", exc_info=error)
    say_error(kind, error_line(str(error)) or kind, code)
    sys.exit(code)


def _fail_usage(error: Exception) -> NoReturn:
    text = error_line(usage_text(error))
    if text:  # empty without a command: click has printed the help instead
        line = f"vitray: {text} (vitray --help)"
        say_error("UsageError", text, ExitCode.BAD_USAGE, line)
    sys.exit(ExitCode.BAD_USAGE)
