"""What --help prints: a heading for each panel, and below it options or commands with their help.

Two columns instead of Typer's five, so that sentences stay readable at 80 columns.
"""

from __future__ import annotations

import shutil
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from rich.console import Console
from rich.text import Text

LEFT = 26  # of the second column
LEAST_WIDTH, MOST_WIDTH = 60, 100
HEADING, NAME, VALUE = "bold", "bold cyan", "cyan"
OPTIONS, COMMANDS = "Options", "Commands"  # panels of what names none


def print_help(command: Any, ctx: Any) -> None:
    """Print the help of a command, or of the group of all commands."""
    width = max(LEAST_WIDTH, min(MOST_WIDTH, shutil.get_terminal_size().columns))
    console = Console(width=width, highlight=False, soft_wrap=True)
    for line in _lines(command, ctx, width):
        console.print(line)


def _lines(command: Any, ctx: Any, width: int) -> Iterable[Text]:
    yield Text.assemble(("Usage: ", HEADING), " ".join([ctx.command_path, *_usage(command, ctx)]))
    yield Text()
    yield from _paragraphs(command.help or "", width)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    if arguments:
        yield from _section("Arguments", [_entry(p) for p in arguments], width)
    for panel, commands in _commands_by_panel(command).items():
        yield from _section(panel, commands, width)
    for panel, options in _options_by_panel(command, ctx).items():
        yield from _section(panel, options, width)
    if command.epilog:
        yield Text()
        yield from _paragraphs(command.epilog, width)


def _usage(command: Any, ctx: Any) -> list[str]:
    """The arguments of a command as its usage shows them: `SOURCE`, or `[SOURCE]` if optional."""
    if hasattr(command, "commands"):
        return ["COMMAND", "…"]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    required = [_name_of(p) for p in arguments if p.required]
    options = [f"{p.opts[0]} {value_of(p)}" for p in _options(command, ctx) if p.required]
    return [*required, *(f"[{_name_of(p)}]" for p in arguments if not p.required), *options, "[…]"]


def _commands_by_panel(command: Any) -> Mapping[str, list[tuple[Text, str]]]:
    panels: dict[str, list[tuple[Text, str]]] = {}
    for name, each in getattr(command, "commands", {}).items():
        panel = getattr(each, "rich_help_panel", None)
        entry = Text(name, NAME), _first_sentence(each.help or "")
        panels.setdefault(panel if isinstance(panel, str) else COMMANDS, []).append(entry)
    return panels


def _options_by_panel(command: Any, ctx: Any) -> Mapping[str, list[tuple[Text, str]]]:
    """The options of each panel: those of the command alone, without a panel, first."""
    panels: dict[str, list[tuple[Text, str]]] = {}
    own = []
    for option in _options(command, ctx):
        panel = getattr(option, "rich_help_panel", None)
        if isinstance(panel, str):
            panels.setdefault(panel, []).append(_entry(option))
        else:
            own.append(_entry(option))
    return {OPTIONS: own, **panels}


def _options(command: Any, ctx: Any) -> list[Any]:
    options = [p for p in command.get_params(ctx) if p.param_type_name == "option"]
    return [option for option in options if not option.hidden]


def _entry(param: Any) -> tuple[Text, str]:
    if param.param_type_name == "argument":
        return Text(_name_of(param), NAME), param.help or ""
    names = ", ".join([*sorted(param.opts, key=len), *param.secondary_opts])
    name = Text(names, NAME)
    if value := value_of(param):
        name.append(f" {value}", VALUE)
    return name, f"{param.help or ''}{_notes(param)}"


def _name_of(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def value_of(option: Any) -> str:
    """What stands for the value of an option: `N`, `a|b`; empty for a switch."""
    if option.is_flag or option.param_type_name == "argument":
        return ""
    if option.metavar:
        return str(option.metavar)
    return metavar(option.type_descriptor.annotation)


def metavar(annotation: Any) -> str:
    """What stands for a value of a type: `N|auto`, `cpu|cuda`, `TEXT`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Annotated, list):
        return metavar(parts[0])
    if origin in (Union, types.UnionType):
        names = [metavar(part) for part in parts if part is not type(None)]
        return "|".join(dict.fromkeys(names))
    return {int: "N", float: "NUMBER", bool: "true|false"}.get(annotation, "TEXT")


def _notes(option: Any) -> str:
    """` (default: 256)` or ` (required)`, unless its help says so."""
    if option.required:
        return " (required)"
    default = option.default
    is_shown = isinstance(default, int | float | str) and not isinstance(default, bool)
    if is_shown and "(default" not in (option.help or ""):
        return f" (default: {default})"
    return ""


def _first_sentence(text: str) -> str:
    return " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")


def _paragraphs(text: str, width: int) -> Iterable[Text]:
    for paragraph in text.split("\n\n"):
        yield from map(Text, textwrap.wrap(" ".join(paragraph.split()), width))


def _section(heading: str, entries: Iterable[tuple[Text, str]], width: int) -> Iterable[Text]:
    """Lines: a heading, then entries with their help beside them, or below where they are long."""
    yield Text()
    yield Text(heading, HEADING)
    for name, text in entries:
        lines = textwrap.wrap(text, width - LEFT) or [""]
        left = Text("  ").append_text(name)
        if left.cell_len > LEFT - 2:
            yield left
            left = Text()
        left.append(" " * (LEFT - left.cell_len))
        yield left.append(lines[0])
        yield from (Text(" " * LEFT + line) for line in lines[1:])
