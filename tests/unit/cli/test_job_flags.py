"""Every field of a job is a flag, and --help shows it where a new user looks."""

from __future__ import annotations

import pytest

from support.command_line import Call
from vitray.cli import app
from vitray.cli.job_flags import JOB_PANELS, config_flags
from vitray.errors import JobError
from vitray.job import Job

WITH_FLAGS = ("run", "plan", "check", "bench", "submit", "backfill", "export-model")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The fields that a command with flags received."""
    return {}


def fields_of(*argv: str) -> dict[str, object]:
    """The fields of a job that these arguments give."""
    import typer

    given: dict[str, object] = {}

    @config_flags(Job, JOB_PANELS)
    def command(source: str, fields: dict[str, object]) -> None:
        given.update(fields)

    probe = typer.Typer()
    probe.command()(command)
    probe(args=["x", *argv], standalone_mode=False)
    return given


def test_every_field_but_the_source_is_in_one_panel() -> None:
    names = [name for panel in JOB_PANELS.values() for name in panel]
    assert sorted(names) == sorted(set(Job.model_fields) - {"source"})


@pytest.mark.parametrize(
    ("argv", "fields"),
    [
        ([], {}),
        (["--batch-size", "32"], {"batch_size": 32}),
        (["--batch-size", "auto"], {"batch_size": "auto"}),
        (["--top-k=3", "--limit=10"], {"top_k": 3, "limit": 10}),
        (["--labels", "false"], {"labels": False}),
        (["--embeddings", "[{pool: mean}]"], {"embeddings": [{"pool": "mean"}]}),
        (["--compile", "off"], {"compile": False}),
        # text is taken as it is written, also where YAML would read a number or a comment
        (["--key-column", "123"], {"key_column": "123"}),
        (["--background", "#ffffff"], {"background": "#ffffff"}),
        (["--revision", "1.0"], {"revision": "1.0"}),
        (["--since", "2026-11-01"], {"since": "2026-11-01"}),
        # lists: one text, which the field may cut at commas, or several flags
        (["--keep", "a,b"], {"keep": "a,b"}),
        (["--keep", "a", "--keep", "b"], {"keep": ["a", "b"]}),
        (["--keep", "a,b", "--keep", "c"], {"keep": ["a", "b", "c"]}),
        (["--prompts", "a, {}", "--prompts", "b {}"], {"prompts": ["a, {}", "b {}"]}),
        (["--prompts", "a photo: {}"], {"prompts": "a photo: {}"}),
        # --set stays, and counts less than a flag
        (["--set", "top_k=2"], {"top_k": 2}),
        (["--set", "top_k=2", "--top-k", "4"], {"top_k": 4}),
    ],
)
def test_flags_become_fields(argv: list[str], fields: dict[str, object]) -> None:
    assert fields_of(*argv) == fields


def test_a_value_that_is_not_yaml_is_named() -> None:
    with pytest.raises(JobError, match=r"--embeddings \[\{: the value is not valid YAML"):
        fields_of("--embeddings", "[{")


@pytest.mark.parametrize("command", WITH_FLAGS)
@pytest.mark.parametrize("columns", [80, 160])
def test_help_lists_every_field_within_the_terminal(
    vitray: Call, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = vitray(command, "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= columns
    flags = {word for line in out.splitlines() for word in line.split()[:1]}
    for flag in ("--batch-size", "--top-k", "--limit", "--device"):
        assert flag in flags, out
    lines = out.splitlines()
    assert lines.index("Speed") < next(i for i, s in enumerate(lines) if "--batch-size" in s)


def test_short_help_is_the_same(vitray: Call) -> None:
    for command in ([], ["run"], ["status"]):
        assert vitray(*command, "-h") == vitray(*command, "--help")


def test_commands_are_grouped_by_purpose(vitray: Call) -> None:
    out = vitray("--help")[1]
    headings = [line for line in out.splitlines() if line and line == line.strip()]
    for heading in ("Label and embed", "Look at a dataset", "Change a dataset", "Models"):
        assert heading in headings
    listed = [
        line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    commands = {
        info.name or info.callback.__name__.replace("_", "-") for info in app.registered_commands
    }
    assert commands <= set(listed)


def test_completion_can_be_installed(vitray: Call) -> None:
    assert "--install-completion" in vitray("--help")[1]
