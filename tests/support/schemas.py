"""Check what vitray prints against the JSON Schemas in docs/schemas."""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn

from jsonschema import Draft202012Validator

from support.paths import ROOT

FOLDER = ROOT / "docs" / "schemas"


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of a schema by the name that documents have, such as vitray/run/v1."""
    _, file, version = name.split("/")
    return Draft202012Validator(json.loads((FOLDER / f"{file}.{version}.json").read_text()))


def checked(text: str) -> dict[str, Any]:
    """The object in a line of output. Fails unless it is valid JSON that fits its schema."""
    document: dict[str, Any] = json.loads(text, parse_constant=_refuse)
    assert next(iter(document)) == "schema", text
    validator(document["schema"]).validate(document)
    return document


def _refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")
