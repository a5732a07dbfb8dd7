"""Which argument is a job file, how JSON is read, and what is said when the shell expanded a
pattern of files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.photo_folders import Call
from vitray.cli import main
from vitray.cli.options import is_file, job_of
from vitray.errors import JobError
from vitray.job import is_job_file, load_job, read_fields
from vitray.training.config import load_config

FIELDS = {
    "source": ["in/*.tar"],
    "model": "m",
    "out": "out",
    "top_k": 3,
    "embeddings": [{"layer": 2, "pool": "mean"}],
}


@pytest.fixture
def vitray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """vitray(*argv) -> (exit code, stdout, stderr), in this process."""

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return (stopped.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    "name",
    ["job.yaml", "j.YAML", "job.yml", "job.YML", "Job.Yaml", "job.json", "JOB.JSON", "my job.Json"],
)
def test_a_job_file_is_known_by_its_suffix_in_any_case(
    vitray: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps(FIELDS))
    assert is_job_file(path) and is_file(str(path))
    job = job_of(str(path), {"top_k": 4})
    assert (job.source, job.model, job.out, job.top_k) == (["in/*.tar"], "m", "out", 4)
    assert (job.embeddings[0].layer, job.embeddings[0].pool) == (2, "mean")
    code, _, err = vitray("plan", path)
    assert (
        code == 2 and err.startswith("SourceError: source ") and "in/*.tar names no object" in err
    ), err


@pytest.mark.parametrize(
    "name",
    ["photos", "a.jsonl", "a.ndjson", "json", "yaml", "a.json.tar", "job.yaml/", "a.yaml.bak"],
)
def test_other_arguments_are_sources(name: str) -> None:
    assert not is_job_file(name)
    assert job_of(name, {"model": "m", "out": "out"}).source == [name]


@pytest.mark.parametrize("name", ["config.json", "config.JSON", "config.YAML"])
def test_a_training_is_read_from_json_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"source": "in", "model": "m", "out": "o", "lr": 1e-3, "epochs": 2}))
    config = load_config(path, {"epochs": 3})
    assert (config.source, config.lr, config.epochs) == (["in"], 0.001, 3)


def test_json_is_read_as_json_is_written(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    text = json.dumps(
        {**FIELDS, "labels": ["\U0001f431", "no", "\u00e9"], "head": None}, indent="\t"
    )
    assert "\\ud83d\\udc31" in text
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("in/*", "in\\/*").encode())
    assert read_fields(path) == {**FIELDS, "labels": ["\U0001f431", "no", "\u00e9"], "head": None}
    job = load_job(path)
    assert (job.labels, job.head, job.source) == (
        ["\U0001f431", "no", "\u00e9"],
        None,
        ["in/*.tar"],
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            '{"source": "a", "model": "m", "source": "b", "out": "o"}',
            "is not valid JSON: `source` appears twice",
        ),
        ('{"embeddings": [{"layer": 1, "layer": 2}]}', "is not valid JSON: `layer` appears twice"),
        (
            '{"source": "a", "max_error_rate": NaN}',
            "is not valid JSON: NaN is not a number in JSON",
        ),
        ('{"source": "a",}', "is not valid JSON: "),
        ("source: a\nmodel: m\nout: o\n", "is not valid JSON: Expecting value: line 1 column 1"),
        ("", "is not valid JSON: "),
        ("[" * 100_000, "is not valid JSON: "),
        (
            '{"path": "a.jpg"}\n{"path": "b.jpg"}\n',
            "is not valid JSON: Extra data: line 2 column 1",
        ),
        ('{"path": "a.jpg"}\n{"path": "b.jpg"}\n', "call a manifest of JSON lines .jsonl"),
        ('[{"path": "a.jpg"}]', 'holds no fields; write an object like {"source": "photos/*.tar"}'),
        ('[{"path": "a.jpg"}]', "call a manifest of JSON lines .jsonl"),
        ('"text"', "holds no fields"),
        ("7", "holds no fields"),
        (
            '{"info": {}, "images": [], "annotations": [], "categories": []}',
            "is not a job file: none of its fields (info, images, annotations, …) is a job field "
            "(a .json file is read as a job",
        ),
        ('{"path": "a.jpg"}', "is not a job file: none of its fields (path) is a job field"),
    ],
)
def test_a_json_file_that_is_no_job_is_refused_in_one_line(
    vitray: Call, tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "my job.JSON"
    path.write_text(text)
    for command in ("run", "plan"):
        code, out, err = vitray(command, path, "--model", "m", "--out", tmp_path / "out")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"JobError: {path} ") and says in err and len(err) < 600, err
    assert sorted(tmp_path.iterdir()) == [path]


def test_bytes_that_are_no_utf8_are_no_json(vitray: Call, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(json.dumps(FIELDS).encode("utf-16"))
    code, _, err = vitray("plan", path)
    assert code == 2 and err.startswith(
        f"JobError: {path} is not valid JSON: 'utf-8' codec can't decode"
    ), err


def test_an_unknown_field_in_json_names_the_nearest_one(vitray: Call, tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**FIELDS, "batchsize": 8}))
    code, _, err = vitray("plan", path)
    assert (code, err) == (
        2,
        "JobError: the job is not valid: unknown field `batchsize`; did you mean `batch_size`?\n",
    )


def test_a_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        job_of(str(tmp_path / "no.json"), {})
    assert str(caught.value) == (
        f"cannot read the job file {tmp_path}/no.json: No such file or directory. Give the path "
        f"of a YAML or JSON file."
    )


def test_a_pattern_of_names_with_spaces_stays_one_word(vitray: Call, photos: Path) -> None:
    (photos / "photos" / "my photos" / "img2.jpg").write_bytes(b"x")
    files = [f"photos/my photos/img{n}.jpg" for n in (1, 2)]
    assert "quote it: vitray run 'photos/my photos/*.jpg' (" in vitray("run", *files)[2]


def test_files_at_different_depths_get_a_pattern_that_crosses_folders(
    vitray: Call, photos: Path
) -> None:
    _, _, err = vitray("run", "photos/a.jpg", "photos/2026/x.png")
    assert (
        "if the shell expanded the pattern, quote it: vitray run 'photos/**'; or list them as "
        "`source`" in err
    )


@pytest.mark.parametrize(
    ("argv", "extra"),
    [
        (["run", "photos/a.jpg", "nothing.jpg"], "nothing.jpg"),
        (["run", "nothing.jpg", "photos/a.jpg"], "photos/a.jpg"),
        (["plan", "job.yaml", "photos/a.jpg"], "photos/a.jpg"),
        (["run", "photos/a.jpg", "photos/a.jpg"], "photos/a.jpg"),
        (["status", "photos/a.jpg", "photos/b.jpg"], "photos/b.jpg"),
    ],
)
def test_other_extra_arguments_are_named(
    vitray: Call, photos: Path, argv: list[str], extra: str
) -> None:
    (photos / "job.yaml").write_text("{}")
    code, out, err = vitray(*argv)
    assert (code, out) == (2, "")
    assert "unexpected extra argument" in err and f"({extra})" in err and "expanded" not in err
