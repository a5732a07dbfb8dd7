"""Everything that vitray prints as JSON has a versioned schema, which the documentation shows."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from jsonschema import Draft202012Validator, ValidationError

import make_reference
import make_schemas
from support.command_line import Call, vitray
from support.schemas import checked
from vitray.cli import is_json_asked, split_options
from vitray.cli.console import QuietLogger, say, screen
from vitray.cli.json_output import SCHEMAS, Schema, schema_of
from vitray.cli.progress_view import json_line, starting_line
from vitray.cli.running import watched
from vitray.cli.training_view import watched_training
from vitray.pipeline import Progress

__all__ = ["vitray"]

COMMANDS = {name for schema in SCHEMAS for name in schema.commands}


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "is_json", True)


# ------------------------------------------------------------------------------ schemas


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_the_file_of_a_schema_is_what_the_code_prints(schema: Schema) -> None:
    text = make_schemas.file_of(schema).read_text(encoding="utf-8")
    assert text == make_schemas.text_of(schema), "stale: make docs"
    Draft202012Validator.check_schema(json.loads(text))


def test_each_file_in_the_folder_is_of_a_schema() -> None:
    files = {make_schemas.file_of(schema) for schema in SCHEMAS}
    assert files == set(make_schemas.FOLDER.iterdir())
    assert len(files) == len({schema.type for schema in SCHEMAS}) == len(SCHEMAS)


def test_every_command_with_json_has_a_schema() -> None:
    commands = make_reference.group().commands
    printing = {
        name for name, command in commands.items() if "as_json" in {p.name for p in command.params}
    }
    assert printing == COMMANDS & commands.keys()
    for variant in COMMANDS - commands.keys():  # such as "plan --probe"
        name, option = variant.split()
        assert any(option in parameter.opts for parameter in commands[name].params), variant


def test_a_result_without_a_schema_is_refused() -> None:
    with pytest.raises(LookupError, match=r"builtins:dict has no schema: add it to SCHEMAS"):
        schema_of({})


def test_an_object_that_lacks_a_field_does_not_fit_its_schema() -> None:
    line = json.loads(starting_line())
    del line["phase"]
    with pytest.raises(ValidationError, match="'phase' is a required property"):
        checked(json.dumps(line))


def test_the_text_about_a_field_is_its_part_of_the_docstring() -> None:
    docstring = "A run. out: the dataset. rows, errors: of it; None: not known. rows: more."
    assert make_schemas.described(docstring, ["out", "rows", "errors"]) == (
        "A run.",
        {
            "out": "the dataset",
            "rows": "of it; null: not known",
            "errors": "of it; null: not known",
        },
    )


# ------------------------------------------------------------------------------ stderr


def test_progress_lines_fit_their_schema() -> None:
    assert checked(starting_line())["phase"] == "starting"
    line = checked(json_line(Progress(shards=2, images_expected=10, good=5)))
    assert (line["schema"], line["images"], line["percent"]) == ("vitray/progress/v1", 5, 50.0)


@pytest.mark.parametrize("name", ["progress", "training-progress"])
def test_the_schema_of_progress_lists_the_phases(name: str) -> None:
    (schema,) = (schema for schema in SCHEMAS if schema.name == name)
    assert "starting" in make_schemas.json_schema(schema)["$defs"]["Phase"]["enum"]


@pytest.mark.parametrize(
    ("argv", "code", "error", "message"),
    [
        (["plan", "/no/such", "--model", "m", "--out", "o"], 2, "SourceError", "does not exist"),
        (["plan", "--bogus"], 2, "UsageError", "No such option: --bogus"),
        (["--bogus"], 2, "UsageError", "No such option: --bogus"),
        (["status", "/no/such"], 2, "JobError", "holds no vitray dataset"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_is_one_object(
    vitray: Call, argv: list[str], code: int, error: str, message: str, is_first: bool
) -> None:
    option = ["--log-format", "json"] if is_first else ["--log-format=json"]
    got, out, err = vitray(*[*option, *argv] if is_first else [*argv, *option])
    line = checked(err)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert (line["level"], line["error"], line["exit_code"]) == ("ERROR", error, code)
    assert message in line["message"]


def test_the_environment_asks_for_json_and_the_option_overrides_it(
    vitray: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAY_LOG_FORMAT", "json")
    assert checked(vitray("status", "/no/such")[2])["error"] == "JobError"
    assert vitray("status", "/no/such", "--log-format", "text")[2].startswith("JobError: ")
    monkeypatch.setenv("VITRAY_LOG_FORMAT", "xml")
    code, _, err = vitray("status", "/no/such")
    assert code == 2 and "VITRAY_LOG_FORMAT" in err and "'xml' is not one of" in err


@pytest.mark.parametrize(
    ("args", "options", "rest"),
    [
        (["run", "in", "--debug"], ["--debug"], ["run", "in"]),
        (["run", "--log-format", "json", "in"], ["--log-format", "json"], ["run", "in"]),
        (["run", "--log-format=json"], ["--log-format", "json"], ["run"]),
        (["run", "--log-format"], ["--log-format", ""], ["run"]),
        (["run", "--", "--debug"], [], ["run", "--", "--debug"]),
    ],
)
def test_options_of_all_commands_may_stand_anywhere(
    args: list[str], options: list[str], rest: list[str]
) -> None:
    assert split_options(args) == (options, rest)


def test_the_last_format_counts() -> None:
    both = ["--log-format", "json", "--log-format", "text"]
    assert not is_json_asked(both, {"VITRAY_LOG_FORMAT": "json"})
    assert is_json_asked(both[:2], {})
    assert is_json_asked([], {"VITRAY_LOG_FORMAT": "json"}) and not is_json_asked([], {})


@pytest.mark.parametrize(
    ("watch", "schema"),
    [(watched, "vitray/progress/v1"), (watched_training, "vitray/training-progress/v1")],
)
def test_a_terminal_shows_json_lines_where_they_are_asked_for(
    as_json: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    watch: Callable[[], AbstractContextManager[object]],
    schema: str,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with watch():
        assert screen.view is None
    line = checked(capsys.readouterr().err)
    assert (line["schema"], line["phase"]) == (schema, "starting")


def test_a_note_of_several_lines_is_one_object(
    as_json: None, capsys: pytest.CaptureFixture[str]
) -> None:
    say("first\nsecond", err=True)
    say("a result\nof two lines")
    out, err = capsys.readouterr()
    assert out == "a result\nof two lines\n"
    line = checked(err)
    assert (line["level"], line["message"]) == ("INFO", "first\nsecond")


@pytest.mark.parametrize(
    ("name", "level", "is_written"),
    [
        ("vitray.pipeline", logging.WARNING, True),
        ("vitray", logging.WARNING, True),
        ("vitrayish", logging.WARNING, False),
        ("torch.onnx", logging.WARNING, False),
        ("torch.onnx", logging.ERROR, True),
    ],
)
def test_only_errors_of_libraries_are_written(name: str, level: int, is_written: bool) -> None:
    logger = QuietLogger(name)
    logger.setLevel(logging.WARNING)
    assert logger.isEnabledFor(level) == is_written
