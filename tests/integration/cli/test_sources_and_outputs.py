"""Sources and outputs that do not exist or may not be used: one line, the right exit code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from factories import hand_made
from support.command_line import Call, refused, subprocess_vitray, without_progress
from support.s3 import KEYS, free_port


def test_an_address_where_nobody_listens_is_named_at_once(labelled: Path, tmp_path: Path) -> None:
    argv = ["run", labelled / "in", "--model", labelled / "model", "--out", tmp_path / "out"]
    found = subprocess_vitray(*argv, "--address", f"127.0.0.1:{free_port()}")
    err = without_progress(found.stderr)
    assert found.returncode == 1 and err.startswith("ClusterError: Ray at 127.0.0.1:"), err
    assert "Connection refused" in err and err.count("\n") == 1


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
            2,
            "AccessError: s3://no-such-bucket",
            "the bucket does not exist. Check its name",
        )
    argv = ["run", tmp_path / "in", "--model", "m", "--out", "s3://no-such-bucket/out"]
    refused(
        vitray,
        tmp_path,
        argv,
        2,
        "AccessError: s3://no-such-bucket/out",
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
        2,
        "AccessError: s3://bucket/in: access refused",
        "AWS_ACCESS_KEY_ID",
    )
