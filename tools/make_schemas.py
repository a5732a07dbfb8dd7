"""The JSON Schemas of what commands print, made from the types in vitray.cli.json_output.

tools/make_reference.py writes them to docs/schemas/. A field's description comes from the docstring
of its class, where it is written as `name: text.`, or `name, other: text.` for several.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from vitray.cli.json_output import SCHEMAS, Schema

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _AllRequired(GenerateJsonSchema):
    """A schema in which each field is required, as commands print all of them."""

    def field_is_required(self, *_: Any, **__: Any) -> bool:
        return True


def file_of(schema: Schema) -> Path:
    """Where the schema is stored."""
    return FOLDER / f"{schema.name}.v{schema.version}.json"


def json_schema(schema: Schema) -> dict[str, Any]:
    """The schema of an output: what pydantic makes of its type, and the field `schema`."""
    kind = type_of(schema)
    made = TypeAdapter(kind).json_schema(mode="serialization", schema_generator=_AllRequired)
    kinds = dict(_dataclasses(kind))
    _describe(made, kinds[kind.__name__])
    for name, nested in made.get("$defs", {}).items():
        if name in kinds:
            _describe(nested, kinds[name])
        elif "enum" in nested:
            nested.pop("description", None)
    shared = {"$defs": made.pop("$defs")} if "$defs" in made else {}
    name = {"const": str(schema), "type": "string", "description": "this schema and its version"}
    return {
        "$schema": DIALECT,
        "title": str(schema),
        "description": made["description"],
        "type": "object",
        "properties": {"schema": name, **made["properties"]},
        "required": ["schema", *made["required"]],
        **shared,
    }


def type_of(schema: Schema) -> type[Any]:
    """The dataclass that is printed."""
    module, _, name = schema.type.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def write() -> None:
    """Write a file for each schema, and remove those of no schema."""
    FOLDER.mkdir(exist_ok=True)
    for old in set(FOLDER.glob("*.json")) - {file_of(schema) for schema in SCHEMAS}:
        old.unlink()
    for schema in SCHEMAS:
        file_of(schema).write_text(text_of(schema), encoding="utf-8")


def text_of(schema: Schema) -> str:
    """The content of the schema's file."""
    return json.dumps(json_schema(schema), indent=2, ensure_ascii=False) + "\n"


def _dataclasses(kind: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    """A dataclass and all that its fields lead to, by name."""
    waiting, seen = [kind], set[type[Any]]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        yield one.__name__, one
        hints = inspect.get_annotations(one, eval_str=True)
        waiting += [part for hint in hints.values() for part in _parts(hint)]


def _parts(hint: Any) -> list[type[Any]]:
    """The dataclasses in a type hint, such as `tuple[Move, ...]`."""
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        return [hint]
    return [part for inner in getattr(hint, "__args__", ()) for part in _parts(inner)]


def _describe(made: dict[str, Any], kind: type[Any]) -> None:
    """Move what the docstring says about fields into the description of each."""
    fields = made.get("properties", {})
    docstring = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    made["description"], meanings = described(docstring, list(fields))
    made.pop("title", None)
    for name, field in fields.items():
        field.pop("title", None)
        field.pop("default", None)
        if name in meanings:
            field["description"] = meanings[name]


def described(docstring: str, fields: Sequence[str]) -> tuple[str, Mapping[str, str]]:
    """The text before the first field that a docstring explains, and the text of each field."""
    name = "|".join(sorted(map(re.escape, fields), key=len, reverse=True))
    head, *parts = re.split(rf"(?:^|(?<=[.;:]\s))((?:(?:{name}), )*(?:{name})): ", docstring)
    meanings = {}
    for names, text in zip(parts[::2], parts[1::2]):
        for one in names.split(", "):
            meanings.setdefault(one, _in_json(text.strip().rstrip(".;")))
    return _in_json(head.strip()), meanings


def _in_json(text: str) -> str:
    """A text about Python values, for readers of JSON."""
    return re.sub(r"\bNone\b", "null", text)
