"""`vitray export MODEL` is still `vitray export-model`; `vitray export OUT` writes rows."""

from __future__ import annotations

import pytest

from vitray.cli.export_model import is_of_model


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "--to", "onnx"], True),
        (["m", "--to=openvino", "--into", "x"], True),
        (["--to", "torch-export", "m"], True),
        (["m", "--to", "coreml", "--fp16"], True),
        (["out", "--to", "csv"], False),
        (["out", "--to=webdataset", "--into", "onnx"], False),
        (["onnx", "--to", "npy"], False),
        (["out", "--to"], False),
        ([], False),
    ],
)
def test_the_format_chooses_the_command(arguments: list[str], expected: bool) -> None:
    assert is_of_model(arguments) is expected
