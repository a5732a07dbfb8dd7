"""Paths that a person writes: `~` is the home directory, in every field and option; never in paths
that come from data.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from vitray.cli import app
from vitray.cli.options import job_of
from vitray.errors import JobError
from vitray.job import Job, load_job, make_job, parse_set
from vitray.schema import Encoded
from vitray.sources import list_shards, read_shard
from vitray.training.config import load_config

BASE: dict[str, object] = {"source": "in", "model": "m", "out": "out"}
HOMES = [
    ("source", "~/photos", ["/home/ada/photos"]),
    ("source", ["~/a/*.tar", "s3://b/~/c"], ["/home/ada/a/*.tar", "s3://b/~/c"]),
    ("source", "~/s-{000..009}.tar", ["/home/ada/s-{000..009}.tar"]),
    ("out", "~/x", "/home/ada/x"),
    ("out", "file://~/x", "file:///home/ada/x"),
    ("out", "~/a/~/b", "/home/ada/a/~/b"),
    ("model", "~/vit", "/home/ada/vit"),
    ("head", "~/heads/pets", "/home/ada/heads/pets"),
    ("allow", "~/a, ~/b/", ["/home/ada/a", "/home/ada/b/"]),
    ("allow", ["file://~/a"], ["file:///home/ada/a"]),
    ("labels", "~/labels.txt", "/home/ada/labels.txt"),
    ("labels", "file://~/labels.txt", "file:///home/ada/labels.txt"),
]


@pytest.fixture(autouse=True)
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")


def from_yaml(folder: Path, fields: dict[str, object]) -> Job:
    (folder / "job.yaml").write_text(json.dumps(fields))
    return load_job(folder / "job.yaml")


def from_python(folder: Path, fields: dict[str, object]) -> Job:
    return Job(**fields)


def from_set(folder: Path, fields: dict[str, object]) -> Job:
    (folder / "job.yaml").write_text(json.dumps(BASE))
    sets = parse_set([f"{name}={json.dumps(value)}" for name, value in fields.items()])
    return job_of(str(folder / "job.yaml"), sets)


def from_options(folder: Path, fields: dict[str, object]) -> Job:
    rest = {name: value for name, value in fields.items() if name != "source"}
    if not isinstance(fields["source"], str):
        rest["source"] = fields["source"]
    return job_of(str(fields["source"]), rest)


@pytest.mark.parametrize("make", [from_yaml, from_python, from_set, from_options])
@pytest.mark.parametrize(("field", "written", "expected"), HOMES)
def test_a_leading_tilde_is_the_home_directory_wherever_a_job_is_written(
    make: Callable[[Path, dict[str, object]], Job],
    tmp_path: Path,
    field: str,
    written: object,
    expected: object,
) -> None:
    job = make(tmp_path, {**BASE, field: written})
    assert getattr(job, field) == expected
    assert {name: getattr(job, name) for name in BASE if name != field} == {
        name: [value] if name == "source" else value
        for name, value in BASE.items()
        if name != field
    }


def test_the_home_of_another_user_is_found_by_its_name() -> None:
    root = pwd.getpwnam("root").pw_dir
    job = make_job({**BASE, "source": ["~root/photos", "file://~root/a"], "out": "~root"})
    assert job.source == [f"{root}/photos", f"file://{root}/a"]
    assert job.out == root


@pytest.mark.parametrize(
    "literal",
    [
        "./~",
        "./~/x",
        "a/~/x",
        "~nobody-of-this-name/x",
        "~backup.tar",
        "s3://~/x",
        "/~/x",
        "\\~/x",
        "{~,a}/x",
    ],
)
def test_only_a_tilde_that_a_shell_expands_is_expanded(literal: str) -> None:
    job = make_job({**BASE, "source": literal, "out": literal, "allow": [literal]})
    assert (job.source, job.out, job.allow) == ([literal], literal, [literal])


def test_labels_and_names_that_begin_with_a_tilde_stay_as_they_are() -> None:
    job = make_job(
        {
            **BASE,
            "labels": ["~/cat", "~"],
            "prompts": ["~/{}"],
            "keep": ["~/x"],
            "key_column": "~/k",
        }
    )
    assert (job.labels, job.prompts, job.keep, job.key_column) == (
        ["~/cat", "~"],
        ["~/{}"],
        ["~/x"],
        "~/k",
    )


def test_a_job_that_was_expanded_once_stays_the_same() -> None:
    job = make_job({**BASE, "source": "~/~/a", "out": "~/~"})
    assert make_job(job.model_dump()) == job
    assert job.out == "/home/ada/~"


@pytest.mark.parametrize(
    ("field", "written"), [("source", "~/a"), ("out", "~"), ("labels", "~/l.txt"), ("allow", "~/a")]
)
def test_without_a_home_directory_the_field_is_named(
    monkeypatch: pytest.MonkeyPatch, field: str, written: str
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(JobError) as caught:
        make_job({**BASE, field: written})
    place = f"{field}.0" if field in ("source", "allow") else field
    assert str(caught.value) == (
        f"the job is not valid: `{place}`: {written}: this user has no home directory; set HOME, "
        f"or write the whole path"
    )


@pytest.mark.parametrize(
    "field",
    ["source", "dataset", "model", "out", "label_table", "teacher", "teacher_model", "allow"],
)
def test_a_leading_tilde_is_the_home_directory_in_a_training_too(
    tmp_path: Path, field: str
) -> None:
    fields: dict[str, object] = {"model": "m", "out": "o", field: "~/x"}
    if field not in ("dataset", "teacher"):
        fields.setdefault("source", "in")
    (tmp_path / "pets.yaml").write_text(json.dumps(fields))
    expected = ["/home/ada/x"] if field in ("source", "allow") else "/home/ada/x"
    assert getattr(load_config(tmp_path / "pets.yaml"), field) == expected
    assert getattr(load_config(tmp_path / "pets.yaml", {field: "~/y"}), field) == json.loads(
        json.dumps(expected).replace("/x", "/y")
    )


def test_the_column_of_a_training_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text(
        json.dumps({"source": "~/in", "model": "m", "out": "o", "label": "~/breed"})
    )
    config = load_config(tmp_path / "pets.yaml")
    assert (config.label, config.source_job().keep) == ("~/breed", ["~/breed"])


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["run", "~/x"], "target"),
        (["backfill", "job.yaml", "--model", "m", "--out=~/x"], "out"),
        (["backfill", "job.yaml", "--model=~/x"], "model"),
        (["compact", "out", "--into=~/x"], "into"),
        (["relabel", "out", "--head=~/x", "--into", "new"], "head"),
        (["relabel", "out", "--head", "h", "--into=~/x"], "into"),
        (["export", "~/x", "--to", "csv", "--into", "new"], "out"),
        (["export", "out", "--to", "csv", "--into=~/x"], "into"),
        (["export-model", "~/x", "--to", "onnx", "--into", "new"], "model"),
        (["export-model", "m", "--to", "onnx", "--into", "new", "--calibrate=~/x"], "calibrate"),
        (["report", "out", "--to=~/x"], "to"),
        (["compare", "~/x", "new"], "old"),
        (["compare", "old", "new", "--page=~/x"], "page"),
        (["search", "out", "--image=~/x"], "image"),
        (["status", "~/x"], "out"),
        (["validate", "~/x"], "out"),
        (["finetune", "~/x"], "config"),
        (["plan", "in", "--prices=~/x"], "prices"),
        (["demo", "~/x"], "directory"),
    ],
)
def test_a_leading_tilde_is_the_home_directory_in_every_command(argv: list[str], name: str) -> None:
    assert params(argv)[name] == "/home/ada/x"


def params(argv: list[str]) -> dict[str, Any]:
    command, *rest = argv
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = group.commands[command].make_context(command, rest).params
    return found


def test_keys_and_columns_on_the_command_line_stay_as_they_are() -> None:
    assert params(["search", "out", "--key", "~/a.jpg"])["key"] == "~/a.jpg"
    assert params(["report", "out", "--truth", "~/a"])["truth"] == "~/a"


def test_paths_in_a_manifest_are_never_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, beside = tmp_path / "home", tmp_path / "in" / "~"
    for folder, data in ((home, b"secret"), (beside, b"public")):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(data)
    user = pwd.getpwuid(os.getuid())
    rows = ["~/a.jpg", f"~{user.pw_name}/a.jpg", "file://~/a.jpg"]
    (tmp_path / "in" / "list.csv").write_text("path\n" + "\n".join(rows) + "\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "in")
    for allow in ([], [str(home), str(tmp_path / "in"), user.pw_dir]):
        job = make_job({**BASE, "source": str(tmp_path / "in" / "list.csv"), "allow": allow})
        (shard,) = list_shards(job, []).shards
        read = [
            (row.data, row.reason)
            for row in read_shard(shard, job, lambda index: True)
            if isinstance(row, Encoded)
        ]
        assert read == [(b"public", None), (None, "missing"), (b"public", None)]
