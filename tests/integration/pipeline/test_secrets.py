"""Canaries: what is secret in the environment is in nothing that a run writes or prints."""

from __future__ import annotations

import os
import secrets
import subprocess
from pathlib import Path

import pytest

from factories.shards import pictures, put_tars
from support.runs import command

SECRETS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
    "MY_PASSWORD",
)


@pytest.mark.parametrize(
    "where",
    [[], pytest.param(["--address", "local"], marks=[pytest.mark.ray, pytest.mark.nightly])],
    ids=["threads", "ray"],
)
@pytest.mark.parametrize("fails", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_no_secret_is_written_or_printed(
    where: list[str], fails: bool, shapes_model: str, tmp_path: Path
) -> None:
    canaries = {name: f"canary{secrets.token_hex(12)}" for name in SECRETS}
    put_tars(str(tmp_path / "in"), pictures(32), 2, tmp_path)
    (tmp_path / "in" / "s-001.tar").write_bytes(
        b"no tar at all" if fails else (tmp_path / "in" / "s-001.tar").read_bytes()
    )
    argv = [*command(tmp_path, shapes_model, tmp_path / "out"), *where]
    argv.insert(argv.index("run"), "--debug")
    environment = {**os.environ, **canaries, "RAY_AUTH_MODE": "token"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == (3 if fails else 0), done.stderr
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    said = [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in written)]
    found = [name for name, canary in canaries.items() for text in said if canary.encode() in text]
    assert found == []
