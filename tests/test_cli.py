"""The command line as a person meets it: one short message and the right exit code for bad input,
nothing written; and `validate`.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import os
import pickle
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hand_made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import KEYS, free_port, new_bucket

from vitray.cli import main
from vitray.dataset import Dataset, append_group_log, committed, read_footer, write_fragment
from vitray.errors import JobError, VitrayError, count
from vitray.job import Embedding, Job, make_job, parse_set, read_fields
from vitray.operations.watching import summary
from vitray.schema import ERROR_SCHEMA, REASONS, SCHEMA_VERSION, ipc_bytes
from vitray.sources import list_shards
from vitray.version import __version__

Call = Callable[..., tuple[int, str, str]]
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def vitray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """vitray(*argv) -> (exit code, stdout, stderr), in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitray", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert isinstance(stopped.value.code, int)
        return (stopped.value.code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def subprocess_vitray(*argv: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitray", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def only_files(folder: Path) -> dict[str, tuple[int, int]]:
    return {path: marks for path, marks in snapshot(folder).items() if os.path.isfile(path)}


def write_job(path: Path, **fields: object) -> Path:
    """A job file (JSON is YAML) for the tars in `in`, with fields replaced, or left out when
    None.
    """
    base = {
        "source": f"{path.parent}/in/*.tar",
        "model": f"{path.parent}/model",
        "out": f"{path.parent}/out",
        **fields,
    }
    path.write_text(json.dumps({name: value for name, value in base.items() if value is not None}))
    return path


def raw(text: str) -> list[str]:
    """The control characters that would reach a terminal."""
    return [c for c in text if not c.isprintable() and c != "\n"]


# ---------------------------------------------------------------- bad jobs


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batchsize": 8}, "unknown field `batchsize`; did you mean `batch_size`?"),
        ({"embeddings": [{"layr": 3}]}, "unknown field `embeddings.0.layr`; did you mean `layer`?"),
        ({"zzzzzz": 1}, "unknown field `zzzzzz`"),
        ({"top_k": "many"}, "`top_k`: Input should be a valid integer"),
        ({"max_error_rate": 2}, "`max_error_rate`: Input should be less than or equal to 1"),
        ({"batch_size": 0}, "valid: `batch_size`: a whole number from 1 to 8192, or auto\n"),
        ({"batch_size": "abc"}, "valid: `batch_size`: a whole number from 1 to 8192, or auto\n"),
        (
            {"fragment_rows": 8193},
            "valid: `fragment_rows`: a whole number from 1 to 8192, or auto\n",
        ),
        (
            {"embeddings": [{"layer": "first"}]},
            "valid: `embeddings.0.layer`: a whole number from 1 to 999, or last\n",
        ),
        (
            {"precision": "bf17"},
            "`precision`: Input should be 'auto', 'bf16', 'fp16', 'fp32' or 'fp8'",
        ),
        (
            {"formats": ["jpg", "heic"]},
            "`formats`: unknown image format heic; known: bmp, gif, jpeg",
        ),
        ({"labels": False, "embeddings": []}, "valid: nothing to compute"),
        (
            {"keep": ["label", "input_label"]},
            "valid: keep: two columns of the output would be called input_label\n",
        ),
        ({"keep": "txt, cls,txt"}, "valid: keep: two columns of the output would be called txt\n"),
        ({"keep": "txt,"}, "`keep.1`: String should have at least 1 character"),
        ({"embeddings": [{}, {}]}, "valid: two embeddings are called cls_last"),
        ({"background": "white"}, "`background`"),
        ({"model": None}, "`model` is missing: Hugging Face id"),
        ({"out": None}, "`out` is missing: output directory"),
        ({"source": None}, "`source` is missing: URL"),
        ({"source": []}, "`source`: List should have at least 1 item"),
        ({"source": ""}, "`source.0`: String should have at least 1 character"),
        ({"source": ["in/*.tar", ""]}, "`source.1`: String should have at least 1 character"),
        ({"out": ""}, "`out`: String should have at least 1 character"),
        ({"format": "zip"}, "`format`: Input should be 'auto', 'tar'"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_bad_job_gets_one_line_that_names_the_field(
    vitray: Call, tmp_path: Path, command: str, fields: dict[str, object], says: str
) -> None:
    hand_made.write_tars(tmp_path / "in", 1)
    refused(
        vitray,
        tmp_path,
        [command, write_job(tmp_path / "job.yaml", **fields)],
        2,
        "JobError: the job is not valid: ",
        says,
    )


def refused(vitray: Call, folder: Path, argv: list[object], code: int, *says: str) -> str:
    """Runs a command that must fail with one line on stderr, nothing on stdout, and nothing
    written.
    """
    before = snapshot(folder)
    got, out, err = vitray(*argv)
    assert got == code, err
    assert out == ""
    assert err.count("\n") == 1 and "Traceback" not in err and raw(err) == []
    assert len(err) < 600
    for text in says:
        assert text in err, err
    assert snapshot(folder) == before
    return err


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("topk=3", "unknown field `topk`; did you mean `top_k`?"),
        ("top_k=x", "`top_k`: Input should be a valid integer"),
        ("top_k", "--set top_k: write --set field=value"),
        ("keep=[a", "--set keep=[a: the value is not valid YAML"),
        ("embeddings=[{pol: cls}]", "unknown field `embeddings.0.pol`; did you mean `pool`?"),
        ("source=", "`source`"),
        ("embeddings=[{layer: 1, layer: 2}]", "the value is not valid YAML"),
        ("out=2024-13-45", "--set out=2024-13-45: the value is not valid YAML"),
    ],
)
def test_a_bad_set_gets_one_line(vitray: Call, tmp_path: Path, pair: str, says: str) -> None:
    refused(
        vitray,
        tmp_path,
        ["run", write_job(tmp_path / "job.yaml"), "--set", pair],
        2,
        "JobError: ",
        says,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"source: [a, b", "is not valid YAML"),
        (b"source: \xff\xfe\x00a", "is not valid YAML"),
        (b"source: a\n\tmodel: b", "is not valid YAML"),
        (b"out: 2024-13-45", "is not valid YAML"),
        (b"[" * 5000, "is not valid YAML"),
        (
            b"source: a\nkeep: [a]\nmodel: m\nkeep: [b]\n",
            "is not valid YAML: `keep` is there twice, again in line 4",
        ),
        (
            b"embeddings:\n- layer: 1\n  layer: 2\n",
            "is not valid YAML: `layer` is there twice, again in line 3",
        ),
        (b"", "holds no fields; write lines like `source: photos/*.tar`"),
        (b"- a\n- b", "holds no fields"),
        (b"just text", "holds no fields"),
    ],
)
def test_an_unreadable_job_file_is_named(
    vitray: Call, tmp_path: Path, text: bytes, says: str
) -> None:
    path = tmp_path / "my job.yaml"
    path.write_bytes(text)
    refused(vitray, tmp_path, ["run", path], 2, f"JobError: {path} ", says)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/object/new:os.system ['touch {mark}']",
        "!!python/name:os.system",
    ],
)
def test_a_python_tag_in_yaml_does_not_run(vitray: Call, tmp_path: Path, value: str) -> None:
    mark, job = tmp_path / "ran", tmp_path / "job.yaml"
    value = value.format(mark=mark)
    job.write_text(f"source: {value}\nmodel: m\nout: o\n")
    refused(
        vitray,
        tmp_path,
        ["plan", job],
        2,
        f"{job} is not valid YAML",
        "could not determine a constructor",
    )
    write_job(job)
    refused(
        vitray, tmp_path, ["plan", job, "--set", f"model={value}"], 2, "the value is not valid YAML"
    )
    assert not mark.exists()


def test_a_missing_job_file_is_named(vitray: Call, tmp_path: Path) -> None:
    refused(
        vitray,
        tmp_path,
        ["run", tmp_path / "no.yaml"],
        2,
        f"cannot read the job file {tmp_path}/no.yaml: No such file",
        "Give",
    )
    (tmp_path / "folder.yaml").mkdir()
    refused(vitray, tmp_path, ["run", tmp_path / "folder.yaml"], 2, "folder.yaml: Is a directory")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run"], "Missing argument 'JOB.yaml|SOURCE'"),
        (["runn", "x"], "No such command 'runn'"),
        (["plan", "x", "--modle", "m"], "No such option: --modle"),
        (["plan", "a", "b"], "unexpected extra argument"),
        (["redo"], "Missing argument 'OUT'"),
        (["run", "x", "--keep", "cls"], "`keep` is a field of the job: write --set keep=…"),
        (
            ["plan", "--batch-size=8", "x"],
            "`batch_size` is a field of the job: write --set batch_size=…",
        ),
        (["bench", "x", "--limit", "1"], "`limit` is a field of the job: write --set limit=…"),
        (
            ["submit", "x", "--address", "http://h:1", "--top-k", "1"],
            "`top_k` is a field of the job: write --set top_k=…",
        ),
        (["run", "--source", "x"], "No such option: --source"),
        (["status", "x", "--keep", "cls"], "No such option: --keep"),
        (["plan", "x", "--set"], "requires an argument"),
        ([f"ru{ESCAPE}n"], "No such command"),
        (["plan", "x", f"--{ESCAPE}"], "No such option"),
    ],
)
def test_bad_usage_exits_2(vitray: Call, tmp_path: Path, argv: list[object], says: str) -> None:
    refused(vitray, tmp_path, argv, 2, "vitray: ", says, "(vitray --help)")


@pytest.mark.parametrize("field", sorted(set(Job.model_fields) - {"source", "model", "out"}))
def test_a_field_given_as_an_option_is_told_how_to_be_set(
    vitray: Call, tmp_path: Path, field: str
) -> None:
    refused(
        vitray,
        tmp_path,
        ["run", "x", f"--{field}", "1"],
        2,
        f"vitray: `{field}` is a field of the job",
        f"write --set {field}=…",
    )


@pytest.mark.parametrize("argv", [["--version"], ["--debug", "--version"], ["--version", "run"]])
def test_version_is_printed(vitray: Call, argv: list[str]) -> None:
    assert vitray(*argv) == (0, f"vitray {__version__}\n", "")


def test_no_command_shows_the_help_and_nothing_else(vitray: Call) -> None:
    code, out, err = vitray()
    assert (
        code == 2
        and "Label and embed image collections" in out + err
        and "(vitray --help)" not in err
    )


# ---------------------------------------------------------------- a job in Python


def test_a_bad_job_in_python_is_a_vitray_error_with_the_same_words() -> None:
    fields: dict[str, object] = {"source": "a", "model": "m", "out": "o", "batchsize": 8}
    said = []
    for make in (
        lambda: Job(**fields),
        lambda: Job.model_validate(fields),
        lambda: make_job(fields),
    ):
        with pytest.raises(VitrayError) as caught:
            make()
        assert isinstance(caught.value, JobError) and caught.value.__suppress_context__
        said.append(str(caught.value))
    assert (
        said == ["the job is not valid: unknown field `batchsize`; did you mean `batch_size`?"] * 3
    )
    with pytest.raises(JobError, match="unknown field `self`"):
        make_job({**fields, "self": 1})


def test_a_job_is_copied_and_pickled_whole() -> None:
    job = Job(
        source="a",
        model="m",
        out="o",
        keep="cls",
        embeddings=[{"layer": 2}, Embedding(pool="mean")],
    )
    assert pickle.loads(pickle.dumps(job)) == job == Job.model_validate_json(job.model_dump_json())
    copied = job.model_copy(update={"out": "x"})
    assert (copied.out, copied.source, copied.embeddings) == ("x", ["a"], job.embeddings)
    assert list(inspect.signature(Job).parameters)[:3] == ["source", "model", "out"]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("keep", "a, b", ["a", "b"]),
        ("keep", ["a,b"], ["a,b"]),
        ("allow", "s3://a/,s3://b/", ["s3://a/", "s3://b/"]),
        ("allow", ["in, out/"], ["in, out/"]),
        ("formats", "png,jpg", ["jpeg", "png"]),
        ("source", "in, out/*.tar", ["in, out/*.tar"]),
    ],
)
def test_a_text_of_names_is_cut_at_its_commas(
    field: str, value: object, expected: list[str]
) -> None:
    assert (
        getattr(make_job({"source": "a", "model": "m", "out": "o", field: value}), field)
        == expected
    )
    if isinstance(value, str):
        assert (
            getattr(
                make_job(
                    {"source": "a", "model": "m", "out": "o", **parse_set([f"{field}={value}"])}
                ),
                field,
            )
            == expected
        )


def test_yaml_anchors_and_merges_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "one: &a {layer: 1, pool: cls}\ntwo: &b {<<: *a, layer: 2}\nembeddings: [*a, {<<: *b, "
        "pool: mean}]\n"
    )
    assert read_fields(path)["embeddings"] == [
        {"layer": 1, "pool": "cls"},
        {"layer": 2, "pool": "mean"},
    ]


# ---------------------------------------------------------------- bad sources, models and outputs


@pytest.mark.parametrize(
    ("files", "source", "code", "says"),
    [
        ([], "nothing/*.tar", 2, "names no object"),
        ([], "nothing", 2, "does not exist"),
        (
            ["in/.hidden", "in/_SUCCESS"],
            "in",
            2,
            "holds no object (names that begin with a dot or an underscore do not count)",
        ),
        (["in/a.tar", "in/b.jpg", "in/c.jpg"], "in", 2, "is a mix: 2 .jpg, 1 .tar. Set `format:`"),
        (["in/a.tar.gz"], "in", 2, "compressed tars (1 .tar.gz)"),
        (["in/a.tar.gz", "in/a.tar"], "in", 2, "compressed tars"),
        (["in/a.txt"], "in", 2, "holds no tar, Parquet, manifest (csv, jsonl) or image: 1 .txt"),
        (
            [],
            "gs://photos/*.tar",
            2,
            "gs://photos/*.tar: vitray reads and writes local paths and s3://, not gs://",
        ),
        ([], "https://x.org/a.tar", 2, "not https://"),
        ([], "in/{5..2}.tar", 2, "the range {5..2} is empty"),
    ],
)
def test_a_bad_source_is_named(
    vitray: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: list[str],
    source: str,
    code: int,
    says: str,
) -> None:
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for command in ("run", "plan"):
        refused(
            vitray,
            tmp_path,
            [command, source, "--model", "m", "--out", "out"],
            code,
            "Error: ",
            says,
            source.split("{")[0],
        )


def test_an_empty_source_on_the_line_is_not_the_current_directory(
    vitray: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_made.write_tars(tmp_path)
    monkeypatch.chdir(tmp_path)
    refused(vitray, tmp_path, ["plan", "", "--model", "m", "--out", "out"], 2, "`source.0`")


@pytest.mark.parametrize("out", ["gs://bucket/out", "hdfs://x/out"])
def test_an_out_of_unknown_scheme_is_refused(vitray: Call, tmp_path: Path, out: str) -> None:
    hand_made.write_tars(tmp_path / "in")
    for command in ("run", "plan"):
        refused(
            vitray,
            tmp_path,
            [command, f"{tmp_path}/in", "--model", "m", "--out", out],
            2,
            out,
            "local paths and s3://",
        )


def test_a_file_in_place_of_out_is_named(vitray: Call, tmp_path: Path) -> None:
    hand_made.write_tars(tmp_path / "in")
    (tmp_path / "out").write_bytes(b"x")
    argv = ["run", f"{tmp_path}/in", "--model", "m", "--out", tmp_path / "out"]
    refused(
        vitray,
        tmp_path,
        argv,
        1,
        f"{tmp_path}/out",
        "A file stands where a folder must be: choose another path.",
    )


def test_an_address_where_nobody_listens_is_named_at_once(labelled: Path, tmp_path: Path) -> None:
    argv = ["run", labelled / "in", "--model", labelled / "model", "--out", tmp_path / "out"]
    found = subprocess_vitray(*argv, "--address", f"127.0.0.1:{free_port()}")
    assert found.returncode == 1 and found.stderr.startswith("ClusterError: Ray at 127.0.0.1:"), (
        found.stderr
    )
    assert "Connection refused" in found.stderr and found.stderr.count("\n") == 1


def test_an_out_without_write_permission_is_named(vitray: Call) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        hand_made.write_tars(folder / "in")
        (folder / "locked").mkdir(mode=0o555)
        argv: list[object] = [
            "run",
            folder / "in",
            "--model",
            "m",
            "--out",
            folder / "locked" / "out",
        ]
        says = (
            f"StorageError: {folder}/locked/out: ",
            "Permission denied. Check the permissions, or choose another path.",
        )
        user = os.geteuid()
        if user == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)  # root may write everywhere
        try:
            refused(vitray, folder, argv, 1, *says)
        finally:
            os.seteuid(user)


def test_a_missing_bucket_is_named(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": mock_s3}.items():
        monkeypatch.setenv(name, value)
    hand_made.write_tars(tmp_path / "in")
    for source in (
        "s3://no-such-bucket/in",
        "s3://no-such-bucket/in/",
        "s3://no-such-bucket",
        "s3://no-such-bucket/*.tar",
    ):
        argv: list[object] = ["plan", source, "--model", "m", "--out", tmp_path / "out"]
        refused(
            vitray,
            tmp_path,
            argv,
            1,
            "StorageError: s3://no-such-bucket",
            "the bucket does not exist. Check its name",
        )
    argv = ["run", tmp_path / "in", "--model", "m", "--out", "s3://no-such-bucket/out"]
    refused(
        vitray,
        tmp_path,
        argv,
        1,
        "StorageError: s3://no-such-bucket/out",
        "the bucket does not exist. Check its name",
    )


def test_s3_without_credentials_says_which_variables(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", mock_s3)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    argv = ["plan", "s3://bucket/in", "--model", "m", "--out", tmp_path / "out"]
    refused(
        vitray,
        tmp_path,
        argv,
        1,
        "StorageError: s3://bucket/in: access refused",
        "AWS_ACCESS_KEY_ID",
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole dataset whose checkpoint exists: `run` has nothing to do, so it needs no Ray."""
    from small_models import make_checkpoint

    from vitray.models import identify

    folder = tmp_path_factory.mktemp("labelled")
    make_checkpoint(folder / "model", "vit", True)
    make_checkpoint(folder / "headless", "vit", False)
    job = hand_made.job_of(folder)
    hand_made.make_dataset(folder, spec=identify(job))
    fields = job.model_dump(mode="json", exclude_unset=True)
    write_job(folder / "a job.yaml", **{**fields, "max_error_rate": 0.2})  # one in ten is bad
    return folder


LINE = [
    "--set",
    "max_error_rate=0.2",
    "--set",
    "precision=fp32",
    "--set",
    "fragment_rows=4",
    "--set",
    "top_k=2",
    "--set",
    "embeddings=[{normalize: true}]",
]


def test_source_model_out_on_the_line_equal_the_job_file(vitray: Call, labelled: Path) -> None:
    before = only_files(labelled)
    code, out, err = vitray("run", labelled / "a job.yaml", "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)
    line = [f"{labelled}/in/*.tar", "--model", labelled / "model", "--out", labelled / "out", *LINE]
    code, out, err = vitray("run", *line, "--json")
    assert (code, err) == (0, "")
    second = json.loads(out)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert (
        first["shards"],
        first["rows"],
        first["errors"],
        first["committed"],
        first["pending"],
    ) == (3, 27, 3, 0, 0)
    plans = [vitray("plan", *argv, "--json") for argv in ([labelled / "a job.yaml"], line)]
    assert plans[0] == plans[1]
    after = only_files(labelled)
    assert after.pop(f"{labelled}/out/_vitray/source.json")  # a dataset made by hand has none
    assert after == before  # nothing pending writes nothing


def test_run_says_what_it_did(vitray: Call, labelled: Path) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"{labelled}/out: 3 shards, 27 rows, 3 errors"


def test_run_says_when_there_was_nothing_to_see(
    vitray: Call, labelled: Path, tmp_path: Path
) -> None:
    from vitray.models import identify

    hand_made.write_tar(tmp_path / "in" / "s.tar", {})
    hand_made.make_dataset(tmp_path, spec=identify(hand_made.job_of(labelled)))
    argv = [f"{tmp_path}/in/*.tar", "--model", labelled / "model", "--out", tmp_path / "out", *LINE]
    code, out, err = vitray("run", *argv)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("0 shards committed now (0 images computed in ")
    assert out.splitlines()[1:] == [
        f"{tmp_path}/out: 1 shard, 0 rows, 0 errors",
        "the shards held no image: check `source`",
    ]


def test_run_says_that_too_many_images_were_bad(vitray: Call, labelled: Path) -> None:
    code, out, err = vitray("run", labelled / "a job.yaml", "--set", "max_error_rate=0.05")
    says = (
        f"too many bad images: 3 of 30, more than max_error_rate=0.05; see {labelled}/out/_errors, "
        f"or raise max_error_rate"
    )
    assert (code, err, out.splitlines()[2:]) == (4, "", [says])


def test_the_summary_counts_in_proper_words() -> None:
    counts = {
        "shards": 1,
        "rows": 1,
        "errors": 3,
        "committed": 1,
        "adopted": 0,
        "images": 1,
        "seconds": 1.0,
        "gone": 1,
        "deleted": 1,
        "pending": 0,
        "shards_not_selected": 2,
        "images_not_selected": 20,
        "left_out": {"hidden": 1, "other_suffix": 2},
        "suffixes": {".txt": 2},
        "errors_path": "/o/_errors",
    }
    found = {
        "set_aside": {},
        "truncated": {},
        "notes": {"s": "links"},
        "reasons": {"empty": 2},
        "too_many_errors": True,
    }
    job = Job(source="a", model="m", out="o", max_error_rate=0.5)
    assert summary(SimpleNamespace(out="/o", **counts, **found), job).splitlines() == [
        "1 shard committed now (1 image computed in 1.0 s, 1.0 images/s with start-up)",
        "/o: 1 shard, 1 row, 3 errors",
        "  2 empty in this run",
        "note       s: links",
        "no longer in the source: 1 committed shard; --prune removes the rows",
        "left out   3: 1 hidden, 2 other_suffix; by suffix: 2 .txt",
        "not chosen 2 shards with 20 images, by since, sample or limit",
        "too many bad images: 2 of 3, more than max_error_rate=0.5; see /o/_errors, or raise "
        "max_error_rate",
    ]


@pytest.mark.parametrize(
    ("sets", "names"),
    [
        (["top_k=3"], ["top_k differs (2, this job: 3)"]),
        (["precision=bf16"], ["precision differs (fp32, this job: bf16)"]),
        (["max_pixels=1000", "formats=jpeg"], ["max_pixels differs", "formats differs"]),
        (["embeddings=[{layer: 2}]"], ["embeddings differs"]),
    ],
)
def test_an_out_of_another_job_is_refused_and_the_fields_are_named(
    vitray: Call, labelled: Path, sets: list[str], names: list[str]
) -> None:
    argv: list[object] = ["run", labelled / "a job.yaml"]
    for pair in sets:
        argv += ["--set", pair]
    err = refused(
        vitray,
        labelled,
        argv,
        2,
        f"FingerprintError: {labelled}/out belongs to fingerprint",
        "Choose another `out`",
        *names,
    )
    assert err.count(" differs ") == len(names)


def test_a_model_that_does_not_exist_is_named(vitray: Call, labelled: Path) -> None:
    argv = ["run", labelled / "a job.yaml", "--model", "nobody/no-such-model"]
    refused(
        vitray, labelled, argv, 2, "ModelError: model nobody/no-such-model", "check the spelling"
    )
    argv[-1] = str(labelled / "nowhere")
    refused(vitray, labelled, argv, 2, f"{labelled}/nowhere")
    argv[-1] = str(labelled / "a job.yaml")
    refused(vitray, labelled, argv, 2, "a job.yaml is a file. Give the directory")


def test_labels_from_a_model_without_head_are_refused(vitray: Call, labelled: Path) -> None:
    argv = ["run", labelled / "a job.yaml", "--model", labelled / "headless"]
    refused(
        vitray,
        labelled,
        argv,
        2,
        "ModelError: ",
        "headless has no trained classification head",
        "labels: false",
    )


# ---------------------------------------------------------------- plan and status


def test_set_wins_over_the_file_and_flags_over_both(vitray: Call, tmp_path: Path) -> None:
    hand_made.write_tars(tmp_path / "in")
    job = write_job(tmp_path / "a job file.yml", limit=3)
    plan = plan_of(vitray, job)
    assert (plan["shards"], plan["out"]) == (3, f"{tmp_path}/out")
    plan = plan_of(
        vitray, job, "--set", "limit=2", "--set", f"out={tmp_path}/x", "--out", f"{tmp_path}/other"
    )
    assert (plan["shards"], plan["out"]) == (2, f"{tmp_path}/other")
    assert plan_of(vitray, job, "--set", "limit=2", "--set", "limit=1")["shards"] == 1
    two = f"source=[{tmp_path}/in/s-000.tar, {tmp_path}/in/s-002.tar]"
    assert plan_of(vitray, job, "--set", two)["shards"] == 2


def plan_of(vitray: Call, *argv: object) -> dict[str, object]:
    code, out, err = vitray("plan", *argv, "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found: dict[str, object] = json.loads(out)
    return found


def test_plan_says_whether_it_compiles_and_refuses_an_engine_without_the_precision(
    vitray: Call, tmp_path: Path
) -> None:
    hand_made.make_dataset(tmp_path, commit=0)
    argv = [f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/new"]
    assert plan_of(vitray, *argv)["compile"].startswith(
        "auto: off (30 images; on from 100,000 a machine"
    )
    assert plan_of(vitray, *argv, "--set", "compile=on")["compile"] == "on"
    assert plan_of(vitray, *argv, "--set", "compile=on", "--set", "engine=openvino")[
        "compile"
    ].startswith("off: engine openvino")
    for engine, precision, has in (("onnx", "bf16", "fp32"), ("openvino", "fp16", "bf16 or fp32")):
        sets = ["--set", f"engine={engine}", "--set", f"precision={precision}"]
        refused(
            vitray,
            tmp_path,
            ["plan", *argv, *sets],
            2,
            f"engine {engine} computes in {has}, not in {precision}. Set precision",
        )


def test_plan_refuses_what_run_would_and_demo_a_place_that_cannot_be(
    vitray: Call, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "file").touch()
    code, _, err = vitray("plan", tmp_path / "in", "--model", "m", "--out", tmp_path / "in" / "out")
    assert code == 2 and "lies inside `source`" in err
    code, _, err = vitray("demo", tmp_path / "file" / "demo")
    assert (
        code == 1 and err.startswith("StorageError: ") and "cannot be made: Not a directory" in err
    )


def test_plan_counts_tars_and_what_is_committed(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    before = snapshot(tmp_path)
    plan = plan_of(vitray, f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out")
    size = sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert (
        plan["kind"],
        plan["shards"],
        plan["images"],
        plan["images_exact"],
        plan["size_bytes"],
    ) == ("tar", 3, 30, True, size)
    assert (plan["committed"], plan["pending"], plan["pending_images"]) == (2, 1, 10)
    decided = {
        "model": f"{tmp_path}/model",
        "precision": "fp32",
        "engine": "torch",
        "batch_size": "4",
        "fragment_rows": "4",
    }
    assert plan["decided"] == decided
    code, out, _ = vitray("plan", f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/new")
    assert code == 0
    assert out.splitlines()[:3] == [
        f"source     3 tar shards, 30 images, {size / 1000:.1f} kB",
        "committed  0 shards",
        "to do      3 shards, 30 images",
    ]
    assert "precision  decided at run" in out
    none = vitray(
        "plan",
        f"{tmp_path}/in",
        "--model",
        "m",
        "--out",
        f"{tmp_path}/new",
        "--set",
        "since=2999-01-01",
    )[1]
    assert none.splitlines()[:4] == [
        "source     0 shards, 0 images, 0 bytes",
        "committed  0 shards",
        "chosen     since chooses whole shards: 0 of 3 tar shards, about 0 of 30 images",
        "not chosen 3 shards with 30 images, by since, sample or limit",
    ]
    assert snapshot(tmp_path) == before
    assert len(committed(dataset.out)) == 2


def test_plan_counts_parquet(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n, rows in enumerate((7, 5, 0)):
        table = pa.table({"image": pa.array([b"x"] * rows, pa.binary())})
        pq.write_table(table, tmp_path / "in" / f"{n}.parquet", row_group_size=3)
    plan = plan_of(vitray, f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out")
    size = sum(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert (plan["kind"], plan["shards"], plan["images"], plan["images_exact"]) == (
        "parquet",
        3,
        12,
        True,
    )
    assert (plan["size_bytes"], plan["committed"], plan["pending_images"], plan["decided"]) == (
        size,
        0,
        12,
        None,
    )


def test_plan_counts_every_byte_of_a_source_cut_into_ranges(vitray: Call, tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("path\n" + "".join(f"images/{n:05d}.jpg\n" for n in range(100)))
    plan = plan_of(
        vitray, path, "--model", "m", "--out", f"{tmp_path}/out", "--set", "group_size=30"
    )
    assert (plan["kind"], plan["shards"], plan["images"]) == ("manifest", 4, 100)
    assert path.stat().st_size - 4 < int(str(plan["size_bytes"])) <= path.stat().st_size


def test_plan_counts_loose_files_in_the_groups_that_out_remembers(
    vitray: Call, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for n in range(10):
        (tmp_path / "in" / f"{n}.jpg").write_bytes(b"x" * (n + 1))
    argv = [f"{tmp_path}/in", "--model", "m", "--out", f"{tmp_path}/out", "--set", "group_size=4"]
    plan = plan_of(vitray, *argv)
    assert (plan["kind"], plan["shards"], plan["images"], plan["size_bytes"]) == (
        "files",
        3,
        10,
        55,
    )
    append_group_log(f"{tmp_path}/out", [(0, f"{tmp_path}/in/{n}.jpg") for n in (0, 9)])
    plan = plan_of(vitray, *argv)
    assert (plan["shards"], plan["images"], plan["images_exact"], plan["pending"]) == (
        3,
        10,
        True,
        3,
    )  # 2 + 4 + 4
    append_group_log(f"{tmp_path}/out", [(1, f"{tmp_path}/in/{n}.jpg") for n in (1, 2)])
    assert plan_of(vitray, *argv)["shards"] == 4  # 2 + 2 + 4 + 2


def test_plan_on_s3_counts_the_same(
    vitray: Call, tmp_path: Path, mock_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitray.storage import store_for

    bucket = new_bucket(mock_s3, monkeypatch)
    hand_made.write_tars(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        assert store_for(bucket).create(f"{bucket}/in/{path.name}", path.read_bytes())
    plan = plan_of(
        vitray, f"{bucket}/in/s-{{000..001}}.tar", "--model", "m", "--out", f"{bucket}/out"
    )
    size = (tmp_path / "in" / "s-000.tar").stat().st_size
    assert (plan["shards"], plan["images"], plan["size_bytes"], plan["pending"]) == (
        2,
        20,
        2 * size,
        2,
    )
    assert [info.url for info in store_for(bucket).find(f"{bucket}/out")] == []


def test_status_tells_how_far(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    last = list_shards(dataset.job, []).shards[2]
    rows = [hand_made.row(dataset, last, i) for i in ()]
    errors = pa.Table.from_pylist(
        [
            {"key": str(n), "shard": last.id, "index": n, "uri": "u", "reason": "empty"}
            for n in range(4)
        ],
        schema=ERROR_SCHEMA,
    )
    write_fragment(
        dataset, last.id, (0, 4), pa.Table.from_pylist(rows, schema=dataset.schema), errors
    )
    code, out, err = vitray("status", dataset.out, "--json")
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert (
        status["complete"],
        status["shards"],
        status["rows"],
        status["errors"],
        status["truncated"],
    ) == (False, 2, 18, 2, {})
    assert (status["staged"], status["last_run"]) == ({last.id: 4}, None)
    assert vitray("status", dataset.out)[1].splitlines()[:3] == [
        f"{dataset.out}: not complete: run the job again to continue",
        "committed  2 shards, 18 rows, 2 errors, 0 shards cut short",
        "staged     4 images of 1 shard",
    ]


def test_a_dataset_is_not_followed(vitray: Call, tmp_path: Path) -> None:
    out = hand_made.make_dataset(tmp_path).out
    refused(
        vitray, tmp_path, ["status", out, "--follow"], 2, "JobError: --follow is for a submission"
    )


@pytest.mark.parametrize(
    "argv",
    [["status"], ["validate"], ["redo", "--reason", "empty"], ["redo", "--shard", "x"], ["clean"]],
)
def test_a_path_without_dataset_is_refused(vitray: Call, tmp_path: Path, argv: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for out in (tmp_path / "in", tmp_path / "nowhere"):
        refused(
            vitray,
            tmp_path,
            [argv[0], out, *argv[1:]],
            2,
            f"JobError: {out} holds no vitray dataset. Check the path",
        )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"fingerprint": "x", "facts": 5}', "\xff"]
)
@pytest.mark.parametrize("command", ["status", "validate", "clean"])
def test_a_damaged_dataset_json_is_named(
    vitray: Call, tmp_path: Path, command: str, text: str
) -> None:
    (tmp_path / "out" / "_vitray").mkdir(parents=True)
    (tmp_path / "out" / "_vitray" / "dataset.json").write_text(text, encoding="latin-1")
    refused(
        vitray,
        tmp_path,
        [command, tmp_path / "out"],
        1,
        f"{tmp_path}/out/_vitray/dataset.json is not readable",
    )


# ---------------------------------------------------------------- redo and clean


def test_redo_asks_which(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out],
        2,
        f"give --shard ID (a file in {dataset.out}/data, without .parquet)",
        "or --reason R, one of ",
        ", ".join(REASONS),
    )
    refused(vitray, tmp_path, ["redo", dataset.out, "--yes"], 2, "give --shard ID ")
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--reason", "ugly"],
        2,
        "--reason R, one of empty, not_an_image",
    )
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--shard", "no-such-shard", "--yes"],
        2,
        "holds no shard no-such-shard",
    )
    refused(
        vitray,
        tmp_path,
        ["redo", dataset.out, "--shard", "../../in/s-000", "--yes"],
        2,
        "holds no shard ../../in/s-000",
    )


def test_redo_deletes_only_what_was_chosen_and_only_with_yes(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path)
    first, *others = sorted(committed(dataset.out))
    before = snapshot(tmp_path)
    code, out, _ = vitray("redo", dataset.out, "--shard", first)
    assert (code, out) == (0, f"{first}\n1 data file would be deleted; add --yes to do it\n")
    assert (
        vitray("redo", dataset.out, "--reason", "empty")[1]
        == "0 data files would be deleted; add --yes to do it\n"
    )
    assert snapshot(tmp_path) == before
    assert vitray("redo", dataset.out, "--shard", first, "--yes")[0] == 0
    assert sorted(committed(dataset.out)) == others
    assert not (tmp_path / "out" / "_errors" / f"{first}.parquet").exists()
    assert not (tmp_path / "out" / "_SUCCESS.json").exists()
    assert vitray("validate", dataset.out)[0] == 0
    code, out, _ = vitray("redo", dataset.out, "--reason", "not_an_image", "--yes")
    assert (code, out.splitlines()[:2]) == (0, others)
    assert committed(dataset.out) == {}


def test_clean_removes_orphans_and_keeps_what_a_run_needs(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    done, _, waiting = (s.id for s in list_shards(dataset.job, []).shards)
    for shard in (done, "gone-0000000000-00000000", waiting):
        folder = tmp_path / "out" / "_vitray" / "staging" / shard
        folder.mkdir(parents=True)
        (folder / "0000000000-0000000004.arrow").write_bytes(b"x")
    code, out, _ = vitray("clean", dataset.out)
    assert (code, out) == (0, f"gone-0000000000-00000000\n{done}\nremoved 2 orphans\n")
    assert os.listdir(tmp_path / "out" / "_vitray" / "staging") == [waiting]
    assert len(committed(dataset.out)) == 2


# ---------------------------------------------------------------- what reaches the terminal


def test_a_hostile_file_name_does_not_reach_the_terminal_raw(vitray: Call, tmp_path: Path) -> None:
    folder = tmp_path / f"in{ESCAPE}"
    folder.mkdir()
    (folder / "a.text").write_bytes(b"x")
    err = refused(
        vitray, tmp_path, ["plan", folder, "--model", "m", "--out", "o"], 2, "holds no tar"
    )
    assert "owned" in err


def test_hostile_text_on_stdout_is_not_raw(vitray: Call, tmp_path: Path) -> None:
    """Names on the line, keys of a tar, and messages that a run record kept."""
    out = tmp_path / f"o{ESCAPE}ut"
    dataset = hand_made.make_dataset(tmp_path, out=str(out))
    path = tmp_path / "in" / "s-000.tar"
    stat = path.stat()
    hand_made.write_tar(
        path, {f"{i}{ESCAPE}.jpg": f"image 0 {i}".encode() for i in range(hand_made.IMAGES)}
    )
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    code, text, err = vitray("validate", dataset.out, "--content")
    assert code == 1 and "is not what was labelled" in text and "owned" in text
    assert raw(text + err) == []
    runs = out / "_vitray" / "runs"
    runs.mkdir()
    record = {
        "finished": "now",
        "images": 1,
        "images_per_s": 1,
        "set_aside": {"s": f"cannot {ESCAPE} read"},
    }
    (runs / "20250101.json").write_text(json.dumps(record))
    (out / "_SUCCESS.json").unlink()
    code, text, err = vitray("status", dataset.out)
    assert code == 0 and "set aside  s: cannot ?]0;owned??[31m read" in text
    assert raw(text + err) == []
    code, text, err = vitray("plan", f"{tmp_path}/in", "--model", "m", "--out", out)
    assert code == 0 and raw(text + err) == []
    code, text, err = vitray("status", dataset.out, "--json")
    assert raw(text + err) == [] and json.loads(text)["last_run"] == record


@pytest.mark.parametrize("at", [0, 1, 2])
def test_debug_shows_the_traceback_anywhere_on_the_line(tmp_path: Path, at: int) -> None:
    argv = ["plan", f"{tmp_path}/{ESCAPE}.yaml"]
    argv.insert(at, "--debug")
    done = subprocess_vitray(*argv)
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("JobError: cannot read the job file")
    assert raw(done.stderr) == []


def test_without_debug_there_is_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = subprocess_vitray("plan", f"{tmp_path}/no.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@contextlib.contextmanager
def waiting(*argv: object) -> Iterator[subprocess.Popen[str]]:
    """The command, which waits for a store that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        connected = threading.Event()
        keep: list[socket.socket] = []
        threading.Thread(
            target=lambda: (keep.append(silent.accept()[0]), connected.set()), daemon=True
        ).start()
        env = {
            **os.environ,
            **KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        command = [sys.executable, "-m", "vitray", *map(str, argv)]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        assert connected.wait(30)
        yield running


def interrupted(running: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Its exit code and the only line that it says, within 10 s of a signal."""
    started = time.monotonic()
    running.send_signal(number)
    out, err = running.communicate(timeout=20)
    assert time.monotonic() - started < 10 and out == ""
    return running.returncode, err.strip()


@pytest.mark.parametrize(
    ("command", "number", "says"),
    [
        ("plan", signal.SIGTERM, "run the same command again."),
        ("plan", signal.SIGINT, "run the same command again."),
        ("run", signal.SIGINT, "what is staged stays. Run the same command again to continue."),
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_a_next_step(
    tmp_path: Path, command: str, number: int, says: str
) -> None:
    with waiting(command, "s3://b/in", "--model", "m", "--out", tmp_path / "out") as running:
        assert interrupted(running, number) == (128 + number, f"interrupted; {says}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_is_interrupted_leaves_nothing(
    dataset: Dataset, tmp_path: Path, number: int
) -> None:
    path = Path(dataset.out, "_vitray", "dataset.json")
    path.write_text(path.read_text().replace(f"{tmp_path}/in/*.tar", "s3://b/in"))
    with waiting(
        "export", dataset.out, "--to", "webdataset", "--into", tmp_path / "made" / "tars"
    ) as running:
        assert list((tmp_path / "made").glob(".tmp-*"))
        assert interrupted(running, number) == (
            128 + number,
            "interrupted; run the same command again.",
        )
    assert list((tmp_path / "made").iterdir()) == []


# ---------------------------------------------------------------- validate


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return hand_made.make_dataset(tmp_path)


def files(dataset: Dataset) -> list[Path]:
    return sorted(Path(dataset.out, "data").iterdir())


def problems_of(vitray: Call, dataset: Dataset, *argv: str) -> list[str]:
    """What validate --json finds; its exit code, its text and its object must agree."""
    code, out, err = vitray("validate", dataset.out, *argv)
    assert err == ""
    again, text, _ = vitray("validate", dataset.out, "--json", *argv)
    problems: list[str] = json.loads(text)["problems"]
    good = "valid so far" if json.loads(text)["pending"] else "valid"
    assert code == again == (1 if problems else 0)
    bad = f"NOT valid: {count(len(problems), 'problem')}"
    assert out.splitlines()[0].startswith(f"{dataset.out}: {bad if problems else good};")
    assert [line.strip() for line in out.splitlines() if line.startswith("  ")] == [
        " ".join(p.split()) for p in problems
    ]
    return problems


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **marks: str) -> None:
    """The data file anew with other rows and, but for `marks`, the same footer."""
    footer = {
        k: v for k, v in (pq.read_metadata(path).metadata or {}).items() if k.startswith(b"vitray.")
    }
    footer |= {f"vitray.{name}".encode(): value.encode() for name, value in marks.items()}
    table = change(pq.ParquetFile(path).read().replace_schema_metadata(None))
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(footer)


def with_vector(table: pa.Table, at: int, vector: list[float]) -> pa.Table:
    values = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1).copy()
    values[at] = vector
    kind = table.schema.field("embedding").type
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), type=kind)
    return table.set_column(
        table.schema.get_field_index("embedding"), table.schema.field("embedding"), column
    )


def with_value(table: pa.Table, name: str, at: int, value: object) -> pa.Table:
    values = [*table[name].to_pylist()[:at], value, *table[name].to_pylist()[at + 1 :]]
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def test_a_whole_dataset_is_valid(vitray: Call, dataset: Dataset, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    for argv in ([], ["--content"], ["--no-inputs"]):
        assert problems_of(vitray, dataset, *argv) == []
    code, out, _ = vitray("validate", dataset.out)
    assert (code, out) == (
        0,
        f"{dataset.out}: valid; 3 files, 27 rows, 3 errors\nsource: 30 images in the committed "
        f"shards\n",
    )
    found = json.loads(vitray("validate", dataset.out, "--json")[1])
    assert (found["files"], found["rows"], found["errors"], found["pending"], found["gone"]) == (
        3,
        27,
        3,
        0,
        0,
    )
    assert (found["images"], found["uncounted"], found["left_out"]) == (30, 0, {})
    assert snapshot(tmp_path) == before


def test_validate_finds_a_flipped_byte_wherever_it_is(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[1]
    whole = path.read_bytes()
    for at in [*range(0, len(whole), len(whole) // 60), *range(len(whole) - 8, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        code, out, err = vitray("validate", dataset.out, "--no-inputs")
        assert (code, err) == (1, ""), f"byte {at}"
        assert all(path.name in line for line in out.splitlines()[1:]) and "NOT valid: " in out, out
    path.write_bytes(whole)
    assert problems_of(vitray, dataset) == []


@pytest.mark.parametrize("kept", [0, 3, 40, -1])
def test_validate_finds_a_cut_file(vitray: Call, dataset: Dataset, kept: int) -> None:
    path = files(dataset)[0]
    path.write_bytes(path.read_bytes()[:kept])
    problems = problems_of(vitray, dataset)
    assert (
        len(problems) == 1
        and path.name in problems[0]
        and "is not a data file of vitray" in problems[0]
    )


DAMAGE: list[tuple[str, Callable[[pa.Table], pa.Table], set[str]]] = [
    (
        "row removed",
        lambda t: t.slice(1),
        {"8 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "last row removed",
        lambda t: t.slice(0, 8),
        {"8 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "row twice",
        lambda t: pa.concat_tables([t.slice(0, 1), t]),
        {
            "10 rows, but its footer says 9",
            "rows are not in the order of their shard, or one appears twice",
            "rows and errors do not make up 0..9",
        },
    ),
    (
        "out of order",
        lambda t: t.take([1, 0, *range(2, 9)]),
        {"rows are not in the order of their shard, or one appears twice"},
    ),
    (
        "no rows",
        lambda t: t.slice(0, 0),
        {"0 rows, but its footer says 9", "rows and errors do not make up 0..9"},
    ),
    (
        "NaN",
        lambda t: with_vector(t, 4, [float("nan"), 0, 0, 0]),
        {"embedding holds NaN or infinity"},
    ),
    (
        "infinity",
        lambda t: with_vector(t, 4, [float("inf"), 0, 0, 0]),
        {"embedding holds NaN or infinity"},
    ),
    ("norm", lambda t: with_vector(t, 4, [0.6, 0.8, 0.1, 0]), {"embedding is not of unit length"}),
    ("zero vector", lambda t: with_vector(t, 4, [0, 0, 0, 0]), {"embedding is not of unit length"}),
    ("vector of another row", lambda t: with_vector(t, 4, [1, 0, 0, 0]), set()),
    ("null vector", lambda t: with_value(t, "embedding", 4, None), {"embedding holds a null"}),
    (
        "label",
        lambda t: with_value(t, "label", 0, "owl"),
        {"a label is not the name of its label_id"},
    ),
    (
        "label_id",
        lambda t: with_value(t, "label_id", 0, 3),
        {"a label_id is not a class of the model"},
    ),
    (
        "negative label_id",
        lambda t: with_value(t, "label_id", 0, -1),
        {"a label_id is not a class of the model"},
    ),
    (
        "no label_id",
        lambda t: with_value(t, "label_id", 0, None),
        {"a label_id is not a class of the model"},
    ),
    ("score", lambda t: with_value(t, "score", 0, 1.5), {"a score is not within 0 and 1"}),
    (
        "NaN score",
        lambda t: with_value(t, "score", 0, float("nan")),
        {"a score is not within 0 and 1"},
    ),
    ("shard", lambda t: with_value(t, "shard", 0, "other"), {"a row names another shard"}),
    ("key", lambda t: with_value(t, "key", 0, "other"), set()),
    ("no key", lambda t: with_value(t, "key", 0, None), set()),
]


@pytest.mark.parametrize(
    ("change", "found"), [pytest.param(c, f, id=name) for name, c, f in DAMAGE]
)
def test_validate_finds_changed_rows(
    vitray: Call, dataset: Dataset, change: Callable[[pa.Table], pa.Table], found: set[str]
) -> None:
    path = files(dataset)[1]
    rewrite(path, change)
    expected = found | {
        "sha256 differs from the manifest",
        "the hash of its rows differs from its footer",
    }
    assert set(problems_of(vitray, dataset)) == {f"data/{path.name}: {text}" for text in expected}


def test_validate_finds_a_missing_column(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[1]
    rewrite(path, lambda t: t.drop_columns(["score"]))
    assert f"data/{path.name}: its schema is not the dataset's" in problems_of(vitray, dataset)


@pytest.mark.parametrize("argv", [[], ["--content"]])
def test_validate_survives_footers_and_columns_that_are_not_ours(
    vitray: Call, dataset: Dataset, argv: list[str]
) -> None:
    first, second, third = files(dataset)
    rewrite(first, lambda t: t.rename_columns(["kex", *t.column_names[1:]]))
    other = pa.table({"index": [3]})
    rewrite(second, lambda t: t, error_rows=base64.b64encode(ipc_bytes(other, "zstd")).decode())
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xb5\xb5")]
    )
    rewrite(
        third,
        lambda t: t.set_column(
            0, "key", pa.concat_arrays([broken, t["key"].combine_chunks().slice(1)])
        ),
    )
    problems = problems_of(vitray, dataset, *argv)
    assert {p.split(":")[0] for p in problems} == {
        f"data/{path.name}" for path in (first, second, third)
    }
    assert f"data/{first.name}: its schema is not the dataset's" in problems


def test_validate_finds_changed_rows_without_a_manifest_too(vitray: Call, tmp_path: Path) -> None:
    dataset = hand_made.make_dataset(tmp_path, commit=2)
    assert problems_of(vitray, dataset) == []
    path = files(dataset)[0]
    rewrite(path, lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    assert problems_of(vitray, dataset) == [
        f"data/{path.name}: the hash of its rows differs from its footer"
    ]


def test_validate_finds_a_file_under_a_wrong_name(vitray: Call, dataset: Dataset) -> None:
    first, second, _ = files(dataset)
    shutil.copy(first, second)
    problems = problems_of(vitray, dataset)
    assert f"data/{second.name}: its footer names shard {first.stem}" in problems
    assert f"data/{second.name}: sha256 differs from the manifest" in problems
    assert f"data/{second.name}: a row names another shard" in problems
    assert all(problem.startswith(f"data/{second.name}: ") for problem in problems)


def test_validate_finds_a_file_of_another_job(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    other = hand_made.make_dataset(tmp_path, out=str(tmp_path / "other"), max_pixels=1000)
    path = files(dataset)[0]
    shutil.copy(Path(other.out, "data", path.name), path)
    problems = problems_of(vitray, dataset)
    assert (
        f"data/{path.name}: fingerprint {other.fingerprint[:8]}… is not the dataset's" in problems
    )


def test_validate_finds_a_file_that_is_no_data_file(vitray: Call, dataset: Dataset) -> None:
    path = Path(dataset.out, "data", "stray.parquet")
    pq.write_table(pa.table({"a": [1]}), path)
    problems = problems_of(vitray, dataset)
    assert any(path.name in p and "is not a data file of vitray" in p for p in problems)


def test_validate_finds_a_missing_data_file(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[2]
    path.unlink()
    assert problems_of(vitray, dataset) == [f"data/{path.name} is in the manifest but missing"]
    assert json.loads(vitray("validate", dataset.out, "--json")[1])["pending"] == 1


def test_validate_finds_a_missing_or_different_errors_file(vitray: Call, dataset: Dataset) -> None:
    first, second, third = files(dataset)
    errors = Path(dataset.out, "_errors")
    (errors / first.name).unlink()
    table = pq.ParquetFile(errors / second.name).read()
    pq.write_table(
        table.set_column(4, table.schema.field(4), pa.array(["empty"])), errors / second.name
    )
    (errors / third.name).write_bytes(b"no parquet at all")
    problems = problems_of(vitray, dataset)
    assert problems[:2] == [
        f"data/{first.name}: its file of error rows is missing; run the job again to repair it",
        f"data/{second.name}: its error rows differ from those in the data file; run the job "
        f"again to repair it",
    ]
    assert problems[2].startswith(f"data/{third.name}: its file of error rows cannot be read")
    assert len(problems) == 3


def test_validate_finds_a_data_file_that_the_manifest_lacks(vitray: Call, dataset: Dataset) -> None:
    path = files(dataset)[0]
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    table = pq.ParquetFile(manifest).read()
    pq.write_table(table.slice(1), manifest)
    assert problems_of(vitray, dataset) == [
        f"data/{path.name}: is not in the manifest, though _SUCCESS.json exists"
    ]


def test_a_data_file_committed_since_the_manifest_is_no_problem_while_a_run_is_not_done(
    vitray: Call, dataset: Dataset
) -> None:
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    pq.write_table(pq.ParquetFile(manifest).read().slice(1), manifest)
    Path(dataset.out, "_SUCCESS.json").unlink()
    assert problems_of(vitray, dataset) == []


@pytest.mark.parametrize("what", ["gone", "garbage", "success"])
def test_validate_checks_the_files_even_when_the_manifest_is_damaged(
    vitray: Call, dataset: Dataset, what: str
) -> None:
    manifest = next(Path(dataset.out, "_vitray").glob("manifest-*.parquet"))
    if what == "gone":
        manifest.unlink()
    elif what == "garbage":
        manifest.write_bytes(b"garbage")
    else:
        Path(dataset.out, "_SUCCESS.json").write_text("{")
    path = files(dataset)[0]
    rewrite(path, lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    problems = problems_of(vitray, dataset)
    assert (
        problems[0].startswith("the manifest cannot be read") and "run the job again" in problems[0]
    )
    assert f"data/{path.name}: the hash of its rows differs from its footer" in problems


def test_inputs_that_changed_went_or_came_are_counted_and_are_no_damage(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    def counts() -> tuple[int, int, int]:
        code, out, _ = vitray("validate", dataset.out, "--json")
        found = json.loads(out)
        return code, found["pending"], found["gone"]

    hand_made.write_tar(tmp_path / "in" / "s-003.tar", {"0.jpg": b"new"})
    assert counts() == (0, 1, 0)
    (tmp_path / "in" / "s-000.tar").unlink()
    assert counts() == (0, 1, 1)
    hand_made.write_tar(tmp_path / "in" / "s-001.tar", {"0.jpg": b"another"})
    assert counts() == (0, 2, 2)
    text = vitray("validate", dataset.out)[1]
    assert ": valid so far; 3 files" in text.splitlines()[0]
    assert (
        text.splitlines()[1]
        == "inputs: 2 shards not committed yet, 2 committed ones no longer listed"
    )
    assert vitray("validate", dataset.out, "--no-inputs")[1].count("\n") == 1


def test_validate_checks_the_files_even_when_the_source_is_gone(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "in")
    rewrite(files(dataset)[0], lambda t: with_vector(t, 4, [1, 0, 0, 0]))
    problems = problems_of(vitray, dataset)
    assert problems[0].startswith(
        f"the source cannot be listed: source {tmp_path}/in/*.tar names no object"
    )
    assert (
        f"data/{files(dataset)[0].name}: the hash of its rows differs from its footer" in problems
    )
    assert len(problems_of(vitray, dataset, "--no-inputs")) == len(problems) - 1


def test_content_finds_bytes_that_rotted_in_the_source(
    vitray: Call, dataset: Dataset, tmp_path: Path
) -> None:
    """The version of a local input is its size and time: only reading it again tells."""
    names = [path.name for path in files(dataset)]
    for shard, old, new in (
        (0, b"image 0 7", b"image 0 8"),
        (1, b"1/04.jpg", b"1/44.jpg"),
        (2, None, None),
    ):
        path = tmp_path / "in" / f"s-{shard:03d}.tar"
        stat, whole = path.stat(), path.read_bytes()
        if old is None:
            path.write_bytes(b"\xff" * len(whole))
        elif old.startswith(b"image"):
            path.write_bytes(whole.replace(old, new))
        else:
            images = [
                (f"1/{i:02d}.jpg" if i != 4 else "1/44.jpg", f"image 1 {i}".encode())
                for i in range(hand_made.IMAGES)
            ]
            hand_made.write_tar(path, dict(images))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    (problem,) = problems_of(vitray, dataset)
    assert (
        problem.startswith(f"data/{names[2]}: the source cannot be counted again: ")
        and "is not a tar" in problem
    )
    problems = problems_of(vitray, dataset, "--content")
    assert problems[:2] == [
        f"data/{names[0]}: image 7 (0/07) is not what was labelled",
        f"data/{names[1]}: image 4 (1/44) is not what was labelled",
    ]
    assert len(problems) == 3 and problems[2].startswith(
        f"data/{names[2]}: the source cannot be read again: "
    )


def test_the_footer_of_a_data_file_is_checked_against_the_dataset(
    vitray: Call, dataset: Dataset
) -> None:
    path = files(dataset)[0]
    bad = pa.Table.from_pylist([{"key": "k", "index": 9}], schema=ERROR_SCHEMA)
    rewrite(path, lambda t: t, errors="0", reasons="{}", error_rows="")
    assert f"data/{path.name}: rows and errors do not make up 0..8" in problems_of(vitray, dataset)
    rewrite(
        path, lambda t: t, errors="1", error_rows=base64.b64encode(ipc_bytes(bad, "zstd")).decode()
    )
    assert (
        f"data/{path.name}: its error rows differ from those in the data file; run the job "
        f"again to repair it" in problems_of(vitray, dataset)
    )
    assert read_footer(str(path)).errors == 1 and SCHEMA_VERSION == 1
    assert np.isclose(
        np.linalg.norm(pq.ParquetFile(files(dataset)[1]).read()["embedding"][0].as_py()), 1
    )


@pytest.mark.parametrize("start", ["&k [x]", "&k [*k]"])
def test_a_value_of_terabytes_or_that_holds_itself_is_one_line(
    vitray: Call, tmp_path: Path, start: str
) -> None:
    deeper = "".join(f"a{n + 1}: &k{n + 1} [{', '.join(10 * [f'*k{n}'])}]\n" for n in range(12))
    job = tmp_path / "job.yaml"
    job.write_text(f"a0: {start.replace('k', 'k0')}\n{deeper}model: m\nout: o\nsource: [*k12]\n")
    started = time.monotonic()
    refused(vitray, tmp_path, ["run", job], 2, "JobError: the job is not valid: ", "`source")
    assert time.monotonic() - started < 20


def test_a_message_of_megabytes_is_shortened_in_its_middle(vitray: Call, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        f"source: s\nmodel: m\nout: o\nlabels: [{'x' * 5_000_000}, {'x' * 5_000_000}]\n"
    )
    code, _, err = vitray("run", tmp_path / "job.yaml")
    assert code == 2 and len(err) < 5000
    assert err.startswith("JobError: the job is not valid: `labels`: label xxx") and err.endswith(
        "xxx is there twice\n"
    )


@pytest.mark.parametrize("value", ["auto", "on", "off"])
def test_on_and_off_are_words_also_where_yaml_thinks_otherwise(tmp_path: Path, value: str) -> None:
    (tmp_path / "job.yaml").write_text(f"source: s\nmodel: m\nout: o\ncompile: {value}\n")
    assert make_job(read_fields(tmp_path / "job.yaml")).compile == value
    assert (
        make_job(
            {"source": "s", "model": "m", "out": "o", **parse_set([f"compile={value}"])}
        ).compile
        == value
    )


def test_a_colour_is_never_taken_for_a_comment(tmp_path: Path) -> None:
    assert parse_set(["background=#ffffff"]) == {"background": "#ffffff"}
    file = tmp_path / "job.yaml"
    file.write_text("source: a\nbackground: #ffffff\n")
    with pytest.raises(
        JobError, match="`background` has no value in line 2; what begins with # goes in quotes"
    ):
        read_fields(file)
    file.write_text("source: a\nbackground: '#ffffff'\nrevision: null\n")
    assert read_fields(file) == {"source": "a", "background": "#ffffff", "revision": None}
