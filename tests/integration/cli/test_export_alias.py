"""`vitray export MODEL` is still `vitray export-model`; `vitray export OUT` writes rows."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from vitray.cli import app


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["export", "m", "--to", "onnx", "--int8", "--calibrate", "p"], "export-model"),
        (["export-model", "m", "--to", "onnx"], "export-model"),
        (["export", "out", "--to", "csv"], "export"),
        (["validate", "--to", "onnx"], "validate"),
    ],
)
def test_the_old_spelling_leads_to_export_model(arguments: list[str], name: str) -> None:
    group: Any = typer.main.get_command(app)
    resolved, command, remaining = group.resolve_command(typer.Context(group), arguments)
    assert resolved == command.name == name
    assert remaining == arguments[1:]
