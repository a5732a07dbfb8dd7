"""Buckets of others: public ones are read without credentials, and of some the requester pays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from support.public_buckets import IMAGES, PAYER, UNSIGNED, images_of, sign, tar_bytes
from vitray.cli import main
from vitray.errors import JobError
from vitray.storage import read


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            UNSIGNED,
            "maybe",
            "is 'maybe': write YES to read public buckets without credentials, or unset it.",
        ),
        (UNSIGNED, " ", "is ' ': write YES"),
        (PAYER, "YES", "is 'YES': write requester to pay for requests yourself, or unset it."),
        (PAYER, "BucketOwner", "is 'BucketOwner': write requester"),
    ],
)
def test_a_bad_value_names_the_variable_and_ends_with_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    says: str,
) -> None:
    sign(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setenv(name, value)
    with pytest.raises(JobError, match=f"^{name} {says}"):
        read("s3://photos/a.tar")
    monkeypatch.setattr(
        sys,
        "argv",
        ["vitray", "plan", "s3://photos/a.tar", "--model", "m", "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"JobError: {name} {says}")
    assert not (tmp_path / "out").exists()


def test_a_bad_value_does_not_matter_where_nothing_is_on_s3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNSIGNED, "maybe")
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    assert images_of(str(tmp_path)) == IMAGES
