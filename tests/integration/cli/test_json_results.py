"""What commands print with --json fits the schema that the reference names for them.

Of every other command a test of its own prints JSON, which tests/conftest.py checks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call
from support.schemas import checked
from vitray.dataset import Dataset
from vitray.operations.submitting import Submission


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return hand_made.make_dataset(tmp_path)


@pytest.mark.parametrize(
    ("command", "argv", "schema"),
    [
        ("status", [], "status"),
        ("status", ["--max-age", "26h"], "status"),
        ("runs", [], "runs"),
        ("validate", ["--content"], "validate"),
        ("accept", ["--list"], "accept"),
        ("redo", ["--reason", "not_an_image"], "redo"),
        ("clean", [], "clean"),
        ("export", ["--to", "csv", "--into", "{folder}/csv"], "export"),
        ("compact", ["--into", "{folder}/large"], "compact"),
        ("report", ["--no-pictures", "--to", "{folder}/report.html"], "report"),
        ("compare", ["{out}"], "compare"),
    ],
)
def test_the_output_of_a_command_fits_its_schema(
    vitray: Call, dataset: Dataset, tmp_path: Path, command: str, argv: list[str], schema: str
) -> None:
    options = [text.format(folder=tmp_path, out=dataset.out) for text in argv]
    code, out, err = vitray(command, dataset.out, *options, "--json")
    assert code in (0, 6), err
    assert out.count("\n") == 1
    assert checked(out)["schema"] == f"vitray/{schema}/v1"


def test_a_submission_fits_its_schema() -> None:
    from vitray.cli.json_output import json_text

    submission = Submission("first", "http://head:8265", "RUNNING", None, "", "s3://photos/out")
    assert checked(json_text(submission))["exit_code"] is None
