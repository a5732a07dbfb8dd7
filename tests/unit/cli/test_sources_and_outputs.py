"""Sources and outputs that do not exist or may not be used: one line, the right exit code."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, refused


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
        2,
        f"{tmp_path}/out",
        "A file stands where a folder must be: choose another path.",
    )


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
            f"AccessError: {folder}/locked/out: ",
            "Permission denied. Check the permissions, or choose another path.",
        )
        user = os.geteuid()
        if user == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)  # root may write everywhere
        try:
            refused(vitray, folder, argv, 2, *says)
        finally:
            os.seteuid(user)
