"""How commands are parsed: patterns without quotes, and the alias of export-model."""

from __future__ import annotations

import glob
import os
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from typer.core import TyperCommand, TyperGroup

from vitray.cli.export_model import is_of_model
from vitray.cli.help_page import print_help
from vitray.cli.options import is_file

# Options whose value may be left out, which typer has no means to declare.
IMPLIED_VALUES = {"--free-model": "0"}


class CommandGroup(TyperGroup):
    """All commands. `vitray export MODEL --to onnx` is an alias of `vitray export-model`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:1] == ["export"] and is_of_model(args):
            args = ["export-model", *args[1:]]
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print_help(self, ctx)


class Command(TyperCommand):
    """A command that explains a pattern that the shell expanded, and knows IMPLIED_VALUES."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print_help(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = args
        args = with_implied_values(given)
        original = list(args)  # the parser empties the list
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if is_usage_error(error):
                why = self._explain_extra_files(ctx, original) or _explain_value(error, given)
                if why:
                    ctx.fail(why)
            raise

    def _explain_extra_files(self, ctx: Any, args: list[str]) -> str:
        """What to do if several files stand where one source is expected; else an empty text."""
        source: Any = next((p for p in self.params if "SOURCE" in str(p.metavar)), None)
        try:
            values, extra, _ = self.make_parser(ctx).parse_args(args)
        except Exception as error:
            if not is_usage_error(error):
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
            f"{beginning}if the shell expanded the pattern, quote it: {quoted}; "
            "or list them as `source` of a job file"
        )


def with_implied_values(args: Sequence[str]) -> list[str]:
    """The arguments, with a value for each of IMPLIED_VALUES that no number follows."""
    options = list(args[: args.index("--")] if "--" in args else args)
    complete = list[str]()
    for arg, following in zip(options, [*options[1:], ""]):
        complete.append(arg)
        if arg in IMPLIED_VALUES and not following.lstrip("-").isdecimal():
            complete.append(IMPLIED_VALUES[arg])
    return [*complete, *args[len(options) :]]


def _explain_value(error: Any, args: Sequence[str]) -> str:
    """What is wrong with a word after one of IMPLIED_VALUES that is left over; else empty."""
    for option, word in pairwise(args):
        if option in IMPLIED_VALUES and f"({word})" in str(error.format_message()):
            return f"{option} {word}: not a whole number. Write a number, or nothing, after it"
    return ""


def is_usage_error(error: Exception) -> bool:
    """Whether it is a usage error of click; Typer has its own copy of click, with other classes."""
    return hasattr(error, "exit_code") and hasattr(error, "format_message")


def usage_text(error: Any) -> str:
    """What is wrong with the arguments, and how to write them if we know that."""
    option = getattr(error, "option_name", "")
    command = error.ctx.command if error.ctx is not None else None
    if command is not None and (sibling := _sibling_with(error.ctx, option)):
        return f"vitray {command.name} takes no {option}: that is an option of vitray {sibling}"
    return str(error.format_message())


def _sibling_with(ctx: Any, option: str) -> str | None:
    """Of export and export-model, the one that has the option while the other was called."""
    siblings = {"export": "export-model", "export-model": "export"}
    sibling = siblings.get(ctx.command.name)
    if sibling is None or ctx.parent is None:
        return None
    parameters = ctx.parent.command.commands[sibling].params
    return sibling if any(option in parameter.opts for parameter in parameters) else None


def _pattern_of(files: Sequence[str]) -> str:
    """The shortest glob that matches the files, as far as a simple one can."""
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
