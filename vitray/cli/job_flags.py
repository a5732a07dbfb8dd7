"""A flag for each field of a job: `batch_size` is `--batch-size`.

The flags are made from the fields of `Job`, so that there is one for every field.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from vitray.cli.help_page import metavar
from vitray.cli.options import Sets
from vitray.job import Embedding, Job, UserConfig, cut_at_commas, parse_set, read_value

# The panels of --help, each with its fields in the order in which they are listed.
JOB_PANELS: Mapping[str, Sequence[str]] = {
    "Model": ("model", "revision", "labels", "prompts", "head"),
    "Output": ("out", "embeddings", "top_k", "keep"),
    "Which images": (
        "limit", "sample", "since", "format", "image_column", "key_column",
        "image_member", "tar_keys", "allow", "group_size", "source_rules",
    ),
    "Decoding": ("decode", "formats", "max_pixels", "background"),
    "Speed": ("batch_size", "device", "precision", "engine", "compile", "fragment_rows"),
    "When to give up": ("max_error_rate", "stall_timeout_s"),
}  # fmt: skip
FIELDS = "fields"  # the parameter of a command that its flags replace
# Fields with words of their own, as more than one metavar can say.
METAVARS: Mapping[str, str] = {
    "embeddings": "YAML",
    "labels": "a,b|FILE|false",
    "since": "TIME|36h|7d",
}


def config_flags(
    config: type[UserConfig], panels: Mapping[str, Sequence[str]], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: a command's parameter `fields` becomes a flag for each field in `panels`.

    The parameter gets the fields that were given, by name, with those of --set, which count less.
    without: fields that have no flag in this command.
    """
    names = [name for panel in panels.values() for name in panel if name not in without]
    flags = [
        _flag(name, config.model_fields[name], panel)
        for panel, panel_names in panels.items()
        for name in panel_names
        if name not in without
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def with_fields(*, sets: list[str] | None = None, **arguments: Any) -> None:
            given = {name: arguments.pop(name) for name in names}
            flag_fields = {
                name: _value(name, config.model_fields[name], values)
                for name, values in given.items()
                if values is not None and values != []
            }
            command(**arguments, **{FIELDS: {**parse_set(sets or []), **flag_fields}})

        own = [p for p in signature.parameters.values() if p.name != FIELDS]
        set_option = inspect.Parameter("sets", _KEYWORD, annotation=Sets, default=None)
        parameters = [p.replace(kind=_KEYWORD) for p in (*flags, *own, set_option)]
        # typer reads the options of a command here
        with_fields.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        with_fields.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_fields

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    """The keyword parameter that typer reads as the flag of a field."""
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help=_help(field),
        metavar=METAVARS.get(name) or metavar(field.annotation),
        show_default=False,
        rich_help_panel=panel,
    )
    kind: Any = list[str] if _is_text_list(field.annotation) else str
    return inspect.Parameter(
        name, _KEYWORD, annotation=Annotated[kind | None, option], default=None
    )


def _help(field: FieldInfo) -> str:
    """The field's description, with its default where that is a number or a word."""
    text = field.description or ""
    default = field.default
    if "default" in text or isinstance(default, bool) or not isinstance(default, int | float | str):
        return text
    return (
        f"{text} (default: {default:,})"
        if isinstance(default, int)
        else f"{text} (default: {default})"
    )


def _is_text_list(annotation: Any) -> bool:
    """Whether a value is a list of texts and nothing else: its flag may be repeated."""
    return get_origin(annotation) is list and get_args(annotation)[0] is not Embedding


def _is_text(annotation: Any) -> bool:
    """Whether a value is text, or None: its flag is taken as it is written."""
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return all(part is type(None) or _is_text(part) for part in get_args(annotation))
    return annotation is str


def _value(name: str, field: FieldInfo, text: str | list[str]) -> object:
    """The value of a field, from the text of its flag. Raises JobError."""
    if isinstance(text, list):
        parts = [part for each in text for part in _parts(each, field)]
        return text[0] if len(text) == 1 else parts
    if _is_text(field.annotation):
        return text
    return read_value(f"--{name.replace('_', '-')} {text}", text)


def _parts(text: str, field: FieldInfo) -> list[str]:
    """The parts of a text between commas, for a field that is cut at commas."""
    cuts = any(getattr(each, "func", None) is cut_at_commas for each in field.metadata)
    return [part.strip() for part in text.split(",")] if cuts else [text]


job_flags = config_flags(Job, JOB_PANELS)
