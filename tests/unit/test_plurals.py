"""Numbers and nouns: `1 shard`, `2 shards`. Everywhere the noun comes from errors.count()."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vitray
from vitray.errors import count

PACKAGE = Path(vitray.__file__).parent
NOUNS = [
    "blocks",
    "classes",
    "columns",
    "cores",
    "CPUs",
    "errors",
    "files",
    "folders",
    "fragments",
    "GPUs",
    "images",
    "inputs",
    "items",
    "keys",
    "labels",
    "machines",
    "members",
    "objects",
    "pages",
    "parts",
    "pictures",
    "problems",
    "queries",
    "records",
    "rows",
    "runs",
    "samples",
    "shards",
    "steps",
    "tars",
    "tokens",
    "values",
    "vectors",
    "workers",
]
PLURAL = re.compile(rf" ({'|'.join(NOUNS)})\b(?! ?/s)")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "shard", "0 shards"),
        (1, "file shard", "1 file shard"),
        (2, "file shard", "2 file shards"),
        (1, "class", "1 class"),
        (1234, "class", "1,234 classes"),
    ],
)
def test_a_number_and_its_noun_agree(number: int, noun: str, text: str) -> None:
    assert count(number, noun) == text


def plurals(text: ast.JoinedStr) -> list[str]:
    """The numbers of an f-string that stand before a noun in the plural, as source text."""
    found = []
    for number, following in zip(text.values, text.values[1:]):
        is_number = isinstance(number, ast.FormattedValue) and not is_constant(number.value)
        if is_number and isinstance(following, ast.Constant):
            noun = PLURAL.match(str(following.value))
            if noun:
                found.append(f"{{{ast.unparse(number.value)}}} {noun[1]}")
    return found


def is_constant(node: ast.expr) -> bool:
    """Whether it is a name in capitals: its value is known, and not one."""
    return isinstance(node, ast.Name) and node.id.isupper()


def test_a_noun_in_the_plural_follows_no_number_that_may_be_one() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {text}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr)
        for text in plurals(node)
    }
    assert sorted(found ^ ALLOWED) == []


# numbers that are never one
ALLOWED = {
    "cli/command.py: {len(files)} files",
    "consume/searching.py: {matches} rows",
    "models/machine.py: {cpu} images",
    "operations/bench_free.py: {sizes[1]} images",
    "operations/bench_free_figures.py: {longer} images",
    "sources/tables.py: {schema.names.count(name)} columns",
}


def test_a_wrong_plural_would_be_found() -> None:
    code = "f\"{n} images, {n:,} shards, {count(n, 'row')}, {MOST} files, {x} of\""
    node = ast.parse(code, mode="eval").body
    assert isinstance(node, ast.JoinedStr)
    assert plurals(node) == ["{n} images", "{n} shards"]
