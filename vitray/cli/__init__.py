"""The command line: each command is one call. The only place that prints, and that configures
logging.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

from vitray.cli import adapting, making, operating
from vitray.cli.console import JsonFormatter, Terminal, is_file, on_signal, one_line, say
from vitray.errors import JobError, VitrayError
from vitray.version import __version__

LogFormat = Literal["text", "json"]
# parameters that are paths, in any command: shells do not expand the `~` of --out=~/x
JOB_PATHS = ("calibrate", "directory", "head", "into", "model", "new", "old", "out", "what")
FILE_PATHS = (
    "image",
    "index",
    "page",
    "planned",
    "prices",
    "config",
    "target",
    "to",
    "working_dir",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Label and embed image collections with a Vision Transformer: one Parquet file a shard, "
    "exactly once.",
    epilog="Exit codes: 0 all committed, 1 a broken system, 2 bad usage or job, 3 done but shards "
    "were cut short or set aside, "
    "4 too many bad images, 5 compare, export: too few labels agree, 129/130/143 interrupted: run "
    "again to go on.",
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"vitray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    log_format: Annotated[
        LogFormat, typer.Option("--log-format", help="of warnings, and of --debug")
    ] = "text",
    version: Annotated[
        bool, typer.Option("--version", callback=_version, help="print the version", is_eager=True)
    ] = False,
) -> None:
    terminal = Terminal()
    text = logging.Formatter("%(levelname)s %(name)s: %(message)s")
    terminal.setFormatter(text if log_format == "text" else JsonFormatter())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[terminal])
    if not debug:
        for noisy in (
            "ray",
            "botocore",
            "aiobotocore",
            "s3fs",
            "fsspec",
            "urllib3",
            "httpx",
            "transformers",
        ):
            logging.getLogger(noisy).setLevel(logging.ERROR)


class _Command(TyperCommand):
    """A command that expands `~` in its paths, and knows what a pattern without quotes becomes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            rest = super().parse_args(ctx, args)
        except Exception as error:
            if _is_usage_error(error) and (explanation := self._explain_extra_files(ctx, given)):
                ctx.fail(explanation)
            raise
        for name in JOB_PATHS + FILE_PATHS:
            if isinstance(value := ctx.params.get(name), str):
                ctx.params[name] = _at_home(value)
        return rest

    def _explain_extra_files(self, ctx: Any, args: list[str]) -> str:
        """What to do where a source is followed by more files; empty where that is not the case."""
        source: Any = next((p for p in self.params if "SOURCE" in str(p.metavar)), None)
        try:
            values, extra, _ = self.make_parser(ctx).parse_args(args)
        except Exception as error:
            if not _is_usage_error(error):
                raise
            return ""
        first = None if source is None else values.get(source.name)
        if not extra or not isinstance(first, str) or is_file(first):
            return ""
        files = [first, *extra]
        if len(set(files)) == 1 or not all(map(os.path.lexists, files)):
            return ""
        option = f"{source.opts[0]} " if source.param_type_name == "option" else ""
        pattern = _pattern_of(files)
        quoted = f"vitray {self.name} {option}{shlex.quote(pattern)}"
        beginning = f"{len(files)} files where one source is expected: "
        if set(glob.glob(pattern)) == set(files):
            return f"{beginning}the shell expanded the pattern; quote it: {quoted}"
        return (
            f"{beginning}if the shell expanded the pattern, quote it: {quoted}; or list them as "
            f"`source` of a job file"
        )


def _is_usage_error(error: Exception) -> bool:
    """Whether it is one of click's, of which Typer has its own copy."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def _at_home(path: str) -> str:
    from vitray.job import expand_home

    try:
        return expand_home(path)
    except ValueError as error:
        raise JobError(f"{error}.") from error


def _pattern_of(files: Sequence[str]) -> str:
    """A glob that names the files, without more of their names than it needs."""
    split = [file.split("/") for file in files]
    if len({len(parts) for parts in split}) > 1:
        return "/".join([*os.path.commonprefix(split), "**"])  # noqa: RUF071
    *folders, names = zip(*split)
    base = [parts[0] if len(set(parts)) == 1 else "*" for parts in folders]
    suffixes = {os.path.splitext(name)[1] for name in names}
    suffix = suffixes.pop() if len(suffixes) == 1 else ""
    short = "/".join([*base, f"*{suffix}"])
    if set(glob.glob(short)) == set(files):
        return short
    return "/".join([*base, f"{os.path.commonprefix(names)}*{suffix}"])  # noqa: RUF071 (of characters)


for command in (*making.COMMANDS, *operating.COMMANDS, *adapting.COMMANDS):
    app.command(cls=_Command)(command)


def entry() -> NoReturn:
    """The console script. Ends without the interpreter's clean-up, where native threads that still
    wake abort the process.
    """
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
        if _is_usage_error(error):
            if text := one_line(
                _usage(error)
            ):  # empty: no command was given, and the help stands there
                print(f"vitray: {text} (vitray --help)", file=sys.stderr)
            sys.exit(2)
        _fail(error, f"unexpected {type(error).__name__}", 1, debug)


def _usage(error: Any) -> str:
    """What click says, or how to set a field of the job that was written as an option."""
    from vitray.job import Job

    field = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    if field in Job.model_fields.keys() - {"source", "model", "out"} and "sets" in {
        p.name for p in error.ctx.command.params
    }:
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
