"""Buckets of others: public ones are read without credentials, and of some the requester pays."""

from __future__ import annotations

import pytest

from support.public_buckets import UNSIGNED, Bucket, sign, tar_bytes
from vitray.storage import read


@pytest.mark.parametrize(
    ("value", "signed"),
    [("YES", False), ("yes", False), ("TRUE", False), ("True", False), ("1", False), ("on", False)]
    + [(value, True) for value in ("NO", "no", "FALSE", "0", "off", "")],
)
def test_the_variable_says_yes_or_no_as_gdal_reads_it(
    mock_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, value: str, signed: bool
) -> None:
    mock_bucket.show_to_everybody()
    sign(monkeypatch)
    monkeypatch.setenv(UNSIGNED, value)
    assert read(f"{mock_bucket.url}/in/a.tar") == tar_bytes()
    assert [header is not None for header in mock_bucket.headers("authorization")] == [
        signed,
        signed,
    ]
